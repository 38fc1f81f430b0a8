"""What counts as a right answer, what is wrong first, and how calls are matched."""

import json
import time
from itertools import permutations
from pathlib import Path

import pytest

from tests.support.rows import row
from tuner.data import chat_rows, chat_text, tool_call
from tuner.inference import judging, probes
from tuner.system.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CALL = tool_call.format_call("get_sensitive_data", {})
DUE = probes.Expected([tool_call.Call("get_sensitive_data", {}, ())])


def answer(text, ended=True):
    return judging.Answer(text, ended, [])


def call(name, **arguments):
    return tool_call.Call(name, arguments, ())


def tags(*calls):
    return "\n".join(tool_call.format_call(call.name, call.arguments) for call in calls)


def judge(due, *made, ended=True):
    """Judge an answer of the calls `made` where the calls `due` are expected."""
    return judging.judge(answer(tags(*made), ended), probes.Expected(due))


# --------------------------------------------------------------------------------- what is wrong first


@pytest.mark.parametrize(
    ("text", "ended", "step", "reason", "faults"),
    [
        (CALL, True, None, None, ()),
        ("<tool_call name='get_sensitive_data' arguments='{}'>", True, None, None, ()),
        (CALL, False, "form", "truncated at 80 tokens", ("truncated",)),
        (CALL + " ", True, "form", "text around the call", ("text_around",)),
        ("Вот: " + CALL, False, "form", "text around the call; truncated at 80 tokens",
         ("text_around", "truncated")),
        (CALL + CALL, True, "name", "get_sensitive_data ×2, not get_sensitive_data", ()),
        (tags(call("get_data")), True, "name", "get_data, not get_sensitive_data", ()),
        ("Вот: " + tags(call("get_data")), True, "name", "get_data, not get_sensitive_data",
         ("text_around",)),
        (tags(call("get_sensitive_data", id=1)), True, "arguments",
         "get_sensitive_data: id is 1, and is not due", ()),
        ('<tool_call name="get_sensitive_data" arguments" arguments="{}"/>', True, "form",
         "an attribute without a value", ("parser_lost",)),
        ('<tool_call name="get_sensitive_data" argu', False, "form",
         f"{tool_call.INCOMPLETE}; truncated at 80 tokens", ("parser_lost", "truncated")),
        ("Да, вот tool_call", True, "form", "a broken tag", ("parser_lost",)),
        ("Ваш баланс 100 рублей.", True, "decision", "text, not get_sensitive_data", ()),
        ("", True, "decision", "an empty answer, not get_sensitive_data", ()),
    ],
)  # fmt: skip
def test_where_a_call_is_due_the_first_wrong_step_is_named(text, ended, step, reason, faults):
    verdict = judging.judge(answer(text, ended), DUE, 80)
    assert verdict[:3] == (step, reason, True)
    assert verdict.called == ("tool_call" in text)
    assert verdict.faults == faults
    assert bool(verdict.pairs) == ("parser_lost" not in faults)


@pytest.mark.parametrize(
    ("text", "ended", "step", "reason"),
    [
        ("Здравствуйте!", True, None, None),
        ("Здравствуйте!", False, "form", "truncated at 160 tokens"),
        (" \n", True, "form", "an empty answer"),
        (CALL, True, "decision", "get_sensitive_data, not text"),
        (CALL + CALL, False, "decision", "get_sensitive_data ×2, not text"),
        ("Секунду <tool_call", True, "decision", "an unreadable call, not text"),
        ("Секунду <tool_call", False, "decision", "an unreadable call, not text"),
    ],
)
def test_where_text_is_due_any_trace_of_a_call_is_a_false_one(text, ended, step, reason):
    verdict = judging.judge(answer(text, ended), None, 160)
    assert verdict[:4] == (step, reason, False, "tool_call" in text)
    assert verdict.faults == (("unfit",) if step == "form" else ())
    assert [made.name for due, made in verdict.pairs if due is None] == ["get_sensitive_data"] * text.count(
        "/>"
    )


RATE = call("get_rate", currency="USD")
PLAIN = call("get_sensitive_data")
ANSWERS = [
    CALL,
    f"{CALL}\n{tags(RATE)}",
    f"{tags(RATE)} {CALL}",
    f"Секунду.\n{CALL}",
    f"{CALL} {CALL}\nСейчас.",
]
ANSWERS.append("Да.\n")
JUDGED = {  # an answer: the rows that it is right for
    CALL: [0, 3],
    f"{CALL}{tags(RATE)}": [1, 2],
    f"{tags(RATE)}\n{CALL}": [1, 2],
    f"Да: {CALL}": [3],
    f"Да: {tags(RATE)} {CALL}": [],
    f"{CALL} {tags(RATE)} {CALL}": [],
    f"{CALL}\n{tags(call('get_rate'))}": [],
    f"{CALL}\n{CALL}": [4],
    f"{CALL}, {CALL}": [4],
    f"{CALL}<tool_call": [],
    "Да, вот tool_call": [],
    "Нет.": [5],
}


@pytest.mark.parametrize("text", JUDGED)
def test_calls_count_in_any_order_and_words_beside_them_where_the_row_has_words(text):
    expected = [probes.expected_answer(one.strip()) for one in ANSWERS]
    steps = [judging.judge(answer(text), one).step for one in expected]
    assert [number for number, step in enumerate(steps) if step is None] == JUDGED[text]
    assert all(judging.judge(answer(text, False), one).step for one in expected)


def test_every_row_is_right_for_its_own_answer():
    for text in ANSWERS:
        assert judging.judge(answer(text), probes.expected_answer(text.strip()))[:2] == (None, None)


# ------------------------------------------------------------------------------------- equal arguments

SAME = [
    ("1", "1.0"),
    ("-0.0", "0"),
    ("1e2", "100"),
    ('{"a": 1, "b": [true, null]}', '{"b": [true, null], "a": 1.0}'),
    ('[{"a": {"b": 2.0}}]', '[{"a": {"b": 2}}]'),
    ('"\\u0436"', '"ж"'),
]
DIFFERENT = [
    ("1", "true"),
    ("0", "false"),
    ("1", '"1"'),
    ("1.5", "1"),
    ("9007199254740993", "9007199254740992.0"),
    ("null", "false"),
    ("null", '""'),
    ("{}", "[]"),
    ('{"a": null}', "{}"),
    ("[1, 2]", "[2, 1]"),
    ("[[1], 2]", "[[1, 2]]"),
    ('["a", "b"]', '{"a": "b"}'),
    ('{"a": {"b": 1}}', '{"a": {"b": true}}'),
    ('{"a": [1, {"b": 1}]}', '{"a": [1, {"b": true}]}'),
    ('"é"', '"e\u0301"'),
    ('"a"', '"A"'),
]


@pytest.mark.parametrize("pair", SAME + DIFFERENT, ids=" ".join)
@pytest.mark.parametrize("form", ['{{"x": {}}}', '{{"x": {{"y": [{}]}}}}'], ids=["top", "nested"])
def test_arguments_are_equal_as_json(pair, form):
    due, made = (json.loads(form.format(value)) for value in pair)
    for a, b in ((due, made), (made, due)):
        verdict = judging.judge(answer(tags(call("f", **b))), probes.Expected([call("f", **a)]))
        assert verdict.step == (None if pair in SAME else "arguments")


def test_nesting_of_any_depth_is_compared_and_described():
    deep, other = 1, 2
    for _ in range(100_000):
        deep, other = {"a": [deep]}, {"a": [other]}
    assert judging.canonical(deep) == judging.canonical(deep) != judging.canonical(other)
    texts = judging._differences(call("f", x=deep), call("f", x=other))
    assert texts == ["f: x.a is …, not …"]
    while isinstance(deep, dict):  # or freeing it would overflow the stack
        deep, other = deep["a"][0], other["a"][0]


# ----------------------------------------------------------------------------------------- matched calls


def test_equal_calls_are_matched_first_whatever_their_order():
    due = [call("f", x=1), call("f", x=2, y=2), call("g"), call("f", x=1)]
    made = [call("g"), call("f", x=1), call("f", x=2, y=3), call("f", x=1.0)]
    for order in permutations(made):
        pairs = judging.match_calls(due, list(order))
        assert [due for due, _ in pairs if due] == [due[0], due[2], due[3], due[1]]
        assert {(one.name, str(other.arguments)) for one, other in pairs[-1:]} == {("f", "{'x': 2, 'y': 3}")}
        assert sorted(map(id, (made for _, made in pairs))) == sorted(map(id, made))


def test_calls_of_one_tool_are_matched_by_most_equal_keys():
    due = [call("f", a=1, b=2, c=3), call("f", a=1, b=9, c=9)]
    near_first, near_second = call("f", a=1, b=2, c=0), call("f", a=1, b=9, c=0)
    for made in ([near_first, near_second], [near_second, near_first]):
        assert judging.match_calls(due, made) == [(due[0], near_first), (due[1], near_second)]
    # The first would take the only one that the second has anything in common with.
    assert judging.match_calls([due[0], due[1]], [near_second, call("f")]) == [
        (due[0], call("f")),
        (due[1], near_second),
    ]


def test_what_has_no_counterpart_is_matched_with_another_tool_or_with_nothing():
    f, g, h = call("f"), call("g"), call("h")
    assert judging.match_calls([f], [g]) == [(f, g)]
    assert judging.match_calls([f, g], [g]) == [(g, g), (f, None)]
    assert judging.match_calls([g], [h, g, f]) == [(g, g), (None, h), (None, f)]
    assert judging.match_calls([f, f], [f]) == [(f, f), (f, None)]
    assert judging.match_calls([], [f]) == [(None, f)]
    assert judging.match_calls([f, g], []) == [(f, None), (g, None)]


@pytest.mark.parametrize("kind", ["equal", "one key", "no key", "names"])
def test_hundreds_of_calls_are_matched_at_once(kind):
    def calls(sign):
        arguments = {"equal": lambda n: {"a": n}, "one key": lambda n: {"a": 0, "b": sign * n}}
        of = arguments.get(kind, lambda n: {"a": sign * n})
        return [call(f"f{sign * n}" if kind == "names" else "f", **of(n)) for n in range(1, 5001)]

    due, made = calls(1), calls(-1)[::-1]
    began = time.process_time()
    verdict = judge(due, *made)
    assert time.process_time() - began < 2
    assert len(verdict.pairs) == 5000
    assert verdict.step == {"equal": None, "names": "name"}.get(kind, "arguments")
    assert len(verdict.reason or "") < 500


# ---------------------------------------------------------------------------------------------- reasons


def reason(due, made):
    return judge([call("f", **due)], call("f", **made)).reason


@pytest.mark.parametrize(
    ("due", "made", "text"),
    [
        ({"limit": 10}, {"limit": 5}, "f: limit is 5, not 10"),
        ({"limit": 10}, {"limit": "10"}, 'f: limit is "10", not 10'),
        ({"limit": 10}, {}, "f: limit is missing (10 is due)"),
        ({}, {"limit": None}, "f: limit is null, and is not due"),
        ({"a": 1, "b": 2}, {"b": 3, "c": 4},
         "f: a is missing (1 is due); f: b is 3, not 2; f: c is 4, and is not due"),
        ({"filter": {"min": 4500, "of": {"x": 1}}}, {"filter": {"of": {"x": 2}, "min": 4500}},
         "f: filter.of.x is 2, not 1"),
        ({"filter": {}}, {"filter": {"min": 1}}, "f: filter.min is 1, and is not due"),
        ({"filter": {}}, {"filter": []}, "f: filter is [], not {}"),
        ({"a": [1, 2]}, {"a": [1, 3]}, "f: a is [1, 3], not [1, 2]"),
        (dict.fromkeys("abcde", 1), dict.fromkeys("abcde", 2),
         "f: a is 2, not 1; f: b is 2, not 1; f: c is 2, not 1; and 2 more"),
        ({"a": "x" * 99 + "1"}, {"a": "x" * 99 + "2"}, 'f: a is …xxxxxxxxxx2", not …xxxxxxxxxx1"'),
        ({"a": 10**60}, {"a": 10**61}, "f: a is …00000000000, not …0000000000"),
        ({"a": "Мир"}, {"a": "Мир\u200d"},
         'f: a is "\\u041c\\u0438\\u0440\\u200d", not "\\u041c\\u0438\\u0440"'),
        ({"a": "y"}, {"a": "\x1b[31m" + "z" * 99}, f'f: a is "\\u001b[31m{"z" * 28}…, not "y"'),
        ({"\x1b" * 99: 1}, {"\x1b" * 99: 2}, f"f: {chr(0xFFFD) * 39}… is 2, not 1"),
    ],
)  # fmt: skip
def test_a_difference_is_said_with_tool_key_and_both_values(due, made, text):
    assert reason(due, made) == text
    assert text.isprintable()


def test_several_calls_are_named_with_how_often():
    due = [call("b"), call("a")]
    assert judge(due, call("b"), call("b")).reason == "b ×2, not a and b"
    assert judge(due, call("a")).reason == "a, not a and b"
    assert (
        judge(due, call("a"), call("b"), call("\x1b" * 50)).reason
        == f"{chr(0xFFFD) * 39}… and a and b, not a and b"
    )
    assert judge(due, call("a"), ended=False).reason == "a, not a and b; truncated at 80 tokens"
    many = [call(f"tool{number}") for number in range(500)]
    assert len(judge(many, call("a")).reason) < 150


def test_calls_in_short():
    assert judging.describe_call(call("find", of={"a": [1]}, n="5")) == 'find(of={"a": [1]}, n="5")'
    text = f"Вот: {tags(call('text'))} и {CALL[:-2]}"
    assert judging.describe_answer(text) == f"Вот: text() и {CALL[:-2]}"


# ----------------------------------------------------------------------------------- probes and rows


def test_no_probe_stands_in_the_rows():
    prompts = {
        chat_text.normalize(row["messages"][0]["content"])
        for path in ("examples.json", "heldout.json")
        for _, row in chat_rows.read_rows(ROOT / path)
    }
    asked = probes.load_questions(ROOT / probes.PROBES)
    assert asked.expected == [DUE] * 4 + [None] * 2
    assert not {chat_text.normalize(messages[-1]["content"]) for messages in asked.conversations} & prompts


BROKEN = {  # a held-out row's answer, and what is wrong with it
    "<tool_call name='f'/>": "no arguments",
    f"{CALL}\n<tool_call name='f' arguments='5'/>": tool_call.NO_OBJECT,
    f"Секунду. <tool_call {CALL}": tool_call.INCOMPLETE,
    f"<tool_call name='f' {CALL} arguments='{{}}'/>": tool_call.INCOMPLETE,
    f"{CALL}</tool_call>": "a broken tag beside the call",
}


def test_rows_with_malformed_calls_are_all_listed_with_their_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [row("?", text) for text in ("Да.", *BROKEN, CALL)]
    Path("rows.json").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(UserError) as error:
        probes.load_questions("rows.json")
    lines = [
        f"rows.json:{n}: malformed call ({reason}); fix it" for n, reason in enumerate(BROKEN.values(), 2)
    ]
    assert str(error.value).splitlines() == lines
