"""What rows do with each tool, and what of it nothing trains or nothing judges."""

import pytest

from tests.support.rows import row
from tuner.data import tool_arguments, tool_call, tool_survey, tool_warnings

TEXT = {"type": "string"}
CLOSED = {"enum": ["card", "loan", None]}
ACCOUNT = {"account": "card"}

BY_HEART = (
    'rows:1 every value of account that held-out rows and probes call "f" with is trained too ("{}"), so a '
    "model that learned these by heart passes; ask for new ones"
)


def ask(prompt, name="f", arguments=None, properties=None):
    """Return a row that calls a tool, and declares it if properties are given."""
    one = row(prompt, tool_call.format_call(name, arguments or {}))
    if properties is not None:
        function = {"name": name, "parameters": {"type": "object", "properties": properties}}
        one["tools"] = [{"type": "function", "function": function}]
    return one


def many(count, *args, **kwargs):
    return [ask(f"вопрос {i}", *args, **kwargs) for i in range(count)]


def numbered(rows):
    return list(enumerate(rows, 1))


def warnings_of(rows, held_out=(), probes=()):
    """Return what is said of three files, each warning with its file and line."""
    files = [numbered(one) for one in (rows, held_out, probes)]
    tools = tool_survey.survey(*files)
    return [f"{w.file or 'rows'}:{w.line} {w.text}" for w in tool_warnings.warnings(tools, *files[1:])]


def test_a_tool_that_few_rows_call_is_told_at_the_first_of_them():
    few = 'rows:2 only {} "g", too few to learn it; write 10 or more'
    for count, says in ((1, "1 row calls"), (9, "9 rows call"), (10, None)):
        rows = [row("Привет", "Да."), *many(count, "g"), *many(10, "f")]
        assert warnings_of(rows) == ([few.format(says)] if says else [])


def test_rows_are_counted_once_and_only_by_what_is_trained():
    twice = tool_call.format_call("f", {}) + "\n" + tool_call.format_call("f", {})
    untrained = row("Да?", tool_call.format_call("f", {}), "И?", "Да.")
    untrained["messages"][1]["weight"] = 0
    tools = tool_survey.survey(numbered([row("Раз", twice), untrained, row("Два", "Да.", "Три", twice)]))
    assert [line for line, _ in tools["f"].rows] == [1, 3]


def test_a_tool_that_is_declared_and_never_called_is_told():
    declares = ask("Раз", "g", {}, {})
    declares["messages"][-1]["content"] = "Да."
    assert warnings_of([*many(10), declares]) == [
        'rows:11 "tools" declares "g", but no row calls it; write 10 rows or more that do, or remove it'
    ]


def test_a_tool_that_is_judged_and_never_trained_is_told_in_each_file_that_asks_for_it():
    held_out = [ask("Раз"), ask("Два", "g"), ask("Три", "g")]
    assert warnings_of(many(10), held_out, [ask("Раз", "g")]) == [
        'held_out:2 calls "g", which is never trained (2 rows of this file call it); add rows that call it, '
        "remove this, or name another file with --held-out",
        'probes:1 calls "g", which is never trained; add rows that call it, remove this, or name another '
        "file with --probes",
    ]


def test_a_tool_that_is_trained_and_never_judged_is_told_where_there_is_a_judge():
    rows = [*many(10), *many(10, "g", ACCOUNT)]
    assert warnings_of(rows) == []
    assert (
        warnings_of(rows, [ask("Раз")])
        == warnings_of(rows, [], [ask("Раз")])
        == ['rows:11 no held-out row or probe calls "g", so nothing says whether it was learned; add some']
    )
    assert len(warnings_of(rows, [row("Раз", "Да.")])) == 2


CASES = {
    "a closed set, of which one value is asked for": (
        [("card", 6), ("loan", 4)], CLOSED, ["card"],
        'rows:1 no held-out row or probe calls "f" with account "loan"; add some that do',
    ),
    "a closed set, all asked for": ([("card", 6), ("loan", 4)], CLOSED, ["card", "loan"], None),
    "a closed set, one value never trained": ([("card", 10)], CLOSED, ["card"], None),
    "a closed set, and one that is none of it": ([("card", 9), ("cards", 1)], CLOSED, ["card"], None),
    "true and false": (
        [(True, 5), (False, 5)], {"type": ["boolean", "null"]}, [True],
        'rows:1 no held-out row or probe calls "f" with account false; add some that do',
    ),
    "true is not 1": (
        [(True, 5), (1, 5)], {"enum": [True, 1]}, [True],
        'rows:1 no held-out row or probe calls "f" with account 1; add some that do',
    ),
    "a closed set of many": ([(i, 1) for i in range(12)], {"enum": list(range(50))}, [0, 13], None),
    "a free value, one of those asked for new": ([("a", 5), ("b", 5)], TEXT, ["a", "c"], None),
    "a free value, none new": (
        [("a", 5), ("b", 5)], TEXT, ["b"],
        BY_HEART.format("b"),
    ),
    "a free value, never asked for": (
        [("a", 10)], TEXT, [None], 'rows:1 no held-out row or probe calls "f" with account; add some that do',
    ),
    "no schema, few values": (
        [("a", 5), ("b", 5), ("c", 4)], None, ["a"],
        'rows:1 no held-out row or probe calls "f" with account "b"; add some that do',
    ),
    "no schema, many values": ([(f"v{i}", 5) for i in range(21)], None, ["v0", "new"], None),
    "no schema, many values, none new": (
        [(f"v{i}", 5) for i in range(21)], None, ["v0"],
        BY_HEART.format("v0"),
    ),
    "many missing": (
        [(i, 2) for i in range(9)], {"enum": list(range(9))}, [0],
        'rows:1 no held-out row or probe calls "f" with account 1, 2, 3, 4, 5, …; add some that do',
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_values_that_nothing_judges_or_that_can_be_learned_by_heart_are_told_once(case):
    trained, schema, asked, says = CASES[case]
    properties = None if schema is None else {"account": schema}
    rows = [
        ask(f"вопрос {i} {value}", "f", {"account": value}, properties)
        for value, count in trained
        for i in range(count)
    ]
    held_out = [ask("ещё", "f", {} if value is None else {"account": value}, properties) for value in asked]
    assert warnings_of(rows, held_out[:1], held_out[1:]) == ([says] if says else [])


def test_the_first_valid_schema_says_what_is_a_closed_set():
    rows = [
        ask("Раз", "f", ACCOUNT, {"account": {"type": "str"}}),
        ask("Два", "f", ACCOUNT),
        *many(10, "f", ACCOUNT, {"account": CLOSED}),
    ]
    assert warnings_of(rows, [ask("Раз", "f", ACCOUNT)]) == []


def test_of_two_tools_with_one_name_in_a_row_the_first_is_used():
    tools = [{"function": {"name": "f", "parameters": {"properties": {key: TEXT}}}} for key in "ab"]
    [fault] = tool_arguments.faults("f", {"a": "1", "b": "2"}, tool_arguments.schemas_of(tools))
    assert fault == '"f" is called with b, which "tools" does not declare; add it there'


def test_nested_arguments_have_dotted_paths():
    nested = {"filter": {"tags": [{"id": 1}, {"id": 2}], "none": None, "empty": []}}
    rows, asked = many(10, "f", nested), [ask("Раз", "f", {"filter": {"tags": [{"id": 1}]}})]
    tools = tool_survey.survey(numbered(rows), numbered(asked))
    assert list(tools["f"].arguments) == [("filter", "tags", "[]", "id")]
    assert warnings_of(rows, asked)[1:] == []
    assert '"f" with filter.tags[].id 2;' in warnings_of(rows, asked)[0]


def test_calls_that_are_judged_are_compared_with_the_tools_of_their_row_or_else_of_those_trained():
    rows = many(10, "f", ACCOUNT, {"account": CLOSED})
    wrong = """turn 2: "f" is called with account: 'cards' is not one of ['card', 'loan', None]"""
    undeclared = 'turn 2: "f" is called with account, which "tools" does not declare; add it there'
    cards = {"account": "cards"}
    judged = [ask("Раз", "f", ACCOUNT, {}), ask("Два", "f", cards), ask("Три", "f", cards, {"account": TEXT})]
    assert warnings_of(rows, judged) == [
        f"held_out:1 {undeclared}",
        f'held_out:2 {wrong}; correct the call or "tools"',
    ]
    invalid = warnings_of(rows, [], [ask("Раз", "f", ACCOUNT, {"account": {"type": "text"}})])
    assert invalid == [
        'probes:1 turn 2: "f" is called, but its schema in "tools" cannot be used: properties.account.type: '
        "'text' is no type of JSON Schema; correct it"
    ]
    earlier = row("Раз", tool_call.format_call("f", cards), "Два", tool_call.format_call("f", ACCOUNT))
    assert warnings_of(rows, [earlier]) == []


@pytest.mark.parametrize(
    ("schema", "values"),
    [
        ({"enum": ["a", None]}, ["a"]),
        ({"const": 0}, [0]),
        ({"type": "boolean"}, [False, True]),
        ({"type": "string"}, None),
        ({"anyOf": [{"enum": ["a"]}, {"type": "null"}]}, ["a"]),
        ({"anyOf": [{"enum": ["a"]}, {"type": "string"}]}, None),
        ({"oneOf": [{"const": "a"}, {"const": "b"}]}, ["a", "b"]),
        ({"type": ["boolean", "null"]}, [False, True]),
        ({"anyOf": [True, {"const": 0}]}, None),
        ({"$ref": "#/$defs/Kind"}, ["x"]),
        ({"allOf": [{"$ref": "#/$defs/Kind"}], "default": "x"}, ["x"]),
        ({"anyOf": [{"$ref": "#/$defs/Kind"}, {"type": "null"}]}, ["x"]),
        ({"$ref": "#/$defs/Circle"}, None),
        ({"$ref": "#/$defs/Nobody"}, None),
        ({"$ref": "#"}, None),
        (True, None),
    ],
)
def test_a_closed_set_is_what_the_schema_says(schema, values):
    definitions = {
        "Kind": {"enum": ["x"]},
        "Circle": {"anyOf": [{"$ref": "#/$defs/Circle"}] * 2},
        "Item": {"properties": {"a": schema}},
    }
    root = {"properties": {"list": {"items": {"$ref": "#/$defs/Item"}}}, "$defs": definitions}
    assert tool_survey.choices(root, ("list", "[]", "a")) == values
    assert tool_survey.choices(root, ("list", "b")) is None
    assert tool_survey.choices({}, ("list", "[]", "a")) is None


def test_the_table_counts_rows_and_values():
    rows = [*many(3, "f", {"a": "x"}), *many(1, "f", {"a": "y", "b": 1}), *many(5, "g")]
    held_out, probes = [ask("Раз", "f", {"a": "z"}), ask("Два", "f", {"a": "x"})], [ask("Три", "g")]
    tools = tool_survey.survey(*map(numbered, (rows, held_out, probes)))
    assert tool_survey.table(tools) == [
        "tools  rows  held out  probes  values trained  asked for  new",
        "g         5         0       1",
        "f         4         2       0",
        "  a                                         2          2    1",
        "  b                                         1          0    0",
    ]
    assert tool_survey.table(tools, is_judged=False) == [
        "tools  rows  values trained",
        "g         5",
        "f         4",
        "  a                       2",
        "  b                       1",
    ]
    assert tool_survey.table(tool_survey.survey(numbered(many(2))), is_judged=False) == [
        "tools  rows",
        "f         2",
    ]


def test_the_table_is_bounded_and_printable():
    names = ["\x1b[2Jк" * 40, *(f"tool{i}" for i in range(60))]
    arguments = {f"k{i}": i for i in range(15)}
    lines = tool_survey.table(tool_survey.survey(numbered([ask("Раз", name, arguments) for name in names])))
    assert len(lines) <= 1 + tool_survey.SHOWN_TOOLS * (tool_survey.SHOWN_ARGUMENTS + 2) + 1
    assert all(line.isprintable() and len(line) < 110 for line in lines)
    assert lines[-1] == "… and 11 more"
    assert "  … and 3 more" in lines
