"""Reading rows: what is legal comes back as it stands, whatever else is an error with its line and cure."""

import hashlib
import json

import datasets
import pytest
from openai.types.chat import ChatCompletionMessage

from tests.support.rows import ASSISTANT, GOOD, SYSTEM, TOOLS, USER, call, plain
from train_qlora import load_data
from tuner.data import chat_rows, row_faults
from tuner.system.errors import UserError


def declared(default):
    """Return a tool with a default value in its parameters."""
    return {"type": "function", "function": {"name": "f", "parameters": {"default": default}}}


def lines(rows, separator="\n"):
    return separator.join(json.dumps(row, ensure_ascii=False) for row in rows)


@pytest.mark.parametrize(
    "data",
    [
        lines(GOOD).encode(),
        lines(GOOD).encode() + b"\n",
        b"\xef\xbb\xbf" + lines(GOOD).encode(),
        lines(GOOD, "\r\n").encode(),
        lines(GOOD, "\n\n \t\n").encode(),
        json.dumps(GOOD).encode(),
        b"\xef\xbb\xbf \r\n" + json.dumps(GOOD, ensure_ascii=False, indent=2).encode(),
    ],
    ids=["lines", "final newline", "BOM", "CRLF", "blank lines", "array", "indented array"],
)
def test_legal_files_give_their_rows_in_order(tmp_path, data):
    path = tmp_path / "rows.json"
    path.write_bytes(data)
    assert load_data(path) == [plain(row) for row in GOOD]
    assert load_data(str(path)) == load_data(path)


def errors_of(tmp_path, data):
    path = tmp_path / "rows.json"
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError) as caught:
        load_data(path)
    return caught.value.faults, str(caught.value)


def row(*messages, **extra):
    return json.dumps({"messages": list(messages), **extra}, ensure_ascii=False)


def user(content):
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{", "not valid JSON"),
        ('{"messages": NaN}', "not valid JSON"),
        ('{"messages": 1, "messages": 2}', 'duplicate key "messages"'),
        ("[" * 100_000, "nested too deeply"),
        ("7", 'a number without "messages"'),
        ("{}", "an empty object"),
        ('{"messages": []}', "an empty list"),
        ('{"messages": {"role": "user"}}', "is an object; write a list"),
        (row(USER, ASSISTANT, system="a"), 'has "system" beside "messages"'),
        (row(USER, ASSISTANT, images=[1]), 'has "images" beside "messages"'),
        (row(USER, ASSISTANT, chosen=[ASSISTANT]), 'has "chosen" beside "messages"'),
        (row(USER, {**ASSISTANT, "weight": 2}), 'the "weight" is neither'),
        (row(USER, {**ASSISTANT, "weight": True}), 'the "weight" is neither'),
        (row(USER, {**ASSISTANT, "weight": 0}), 'every "weight" is 0'),
        (row(USER, {**ASSISTANT, "thinking": "a"}), 'message 2: has "thinking"'),
        (row(USER, {**ASSISTANT, "masked": True}), 'write "weight" instead'),
        (row({**USER, "images": ["a"]}, ASSISTANT), 'message 1: has "images"'),
        (row(USER, {"role": "assistant", "content": None, "refusal": "Нет"}), 'has "refusal": write it as'),
        (row({"from": "human", "value": "a"}, ASSISTANT), 'message 1: has "from" instead of "role"'),
        (row(SYSTEM, {**SYSTEM, "role": "developer"}, USER, ASSISTANT), 'consecutive "system" messages'),
        (row(USER, ASSISTANT, label=False), 'has "label" beside "messages": false marks a wrong answer'),
        (row({"type": "human", "content": "a"}, ASSISTANT), 'has "type" instead of "role"'),
        (row(USER, {"role": "observation", "content": "5"}, ASSISTANT), 'is "observation"; write "tool"'),
        (row(USER, {"role": "function_call", "content": "{}"}), 'with the call in "tool_calls"'),
        (row(USER, {**ASSISTANT, "content": [{"type": "tool_use", "id": "a"}]}), 'in the "tool_calls"'),
        (row(user([{"type": "tool_result", "content": "5"}]), ASSISTANT), 'a message of the role "tool"'),
        ('{"instruction": "a", "output": "b"}', "Alpaca"),
        ('{"conversations": [{"from": "human", "value": "a"}]}', "ShareGPT"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}', "preference pair"),
        (row(USER), 'the last message is from "user"; end the row with an "assistant" turn'),
        (row(SYSTEM), 'the last message is from "system"'),
        (row(ASSISTANT), 'first message must be from "user"'),
        (row(SYSTEM, ASSISTANT), 'first message must be from "user"'),
        (row(USER, USER, ASSISTANT), 'message 2: consecutive "user" messages'),
        (row(USER, ASSISTANT, ASSISTANT), 'message 3: consecutive "assistant" messages'),
        (row(USER, ASSISTANT, SYSTEM), 'message 3: "system" may only come first'),
        (row("hello", ASSISTANT), "message 1: is a string"),
        (row({"role": "bot", "content": "a"}), 'the role is "bot"; write "assistant"'),
        (row({"role": 5, "content": "a"}), "the role is a number"),
        (row({"content": "a"}), "the role is null or missing"),
        (row(user(""), ASSISTANT), "the content is empty"),
        (row(user(" \n\u00a0"), ASSISTANT), "the content is empty"),
        (row(user([]), ASSISTANT), "the content is an empty list"),
        (row(user(None), ASSISTANT), "the content is null or missing"),
        (row(user(True), ASSISTANT), "the content is true or false"),
        (row(user([{"type": "image", "url": "x"}]), ASSISTANT), "only text is supported"),
        (row(user(["a"]), ASSISTANT), "only text is supported"),
        (row(user([{"type": "text", "text": 1}]), ASSISTANT), 'the "text" of a part is a number'),
        (row(user([{"type": "text", "text": " "}]), ASSISTANT), "the content is empty"),
        (row(user("a<end_of_turn>b"), ASSISTANT), "contains the control token <end_of_turn>"),
        (row(user([{"type": "text", "text": "<bo"}, {"type": "text", "text": "s>"}]), ASSISTANT), "<bos>"),
        ('{"messages": [{"role": "user", "content": "\\ud83d"}]}', "half a surrogate pair"),
    ],
)
def test_an_error_names_line_and_cure(tmp_path, source, says):
    errors, message = errors_of(tmp_path, f"{row(USER, ASSISTANT)}\n\n{source}\n{row(USER, ASSISTANT)}")
    assert errors
    assert {line for line, _ in errors} == {3}
    assert any(says in text for _, text in errors), errors
    assert all("; " in text or '": ' in text for _, text in errors), "what is wrong; what to do"
    assert f"{tmp_path}/rows.json:3: " in message


def calling(*calls, **more):
    return {"role": "assistant", "tool_calls": list(calls), **more}


def result(identifier, content="5", **more):
    return {"role": "tool", "tool_call_id": identifier, "content": content, **more}


A, B = call("a"), call("b")


def without(key, value):
    return {k: v for k, v in value.items() if k != key}


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (row(USER, calling()), "message 2: the content is null or missing"),
        (row(USER, calling(content="Да", tool_calls={})), '"tool_calls" is an empty object'),
        (row(USER, calling("a")), "call 1: is a string without"),
        (row(USER, calling(A, without("function", B))), 'call 2: is an object without "function"'),
        (row(USER, calling({**A, "type": "custom"})), 'the type is not "function"'),
        (row(USER, calling({**A, "id": 7})), 'the "id" is a number'),
        (row(USER, calling(A, B, A)), 'call 3: duplicate "id" "a"'),
        (row(USER, calling(call("a", None))), "the name is null or missing"),
        (row(USER, calling(call("a", ""))), "the name is empty"),
        (row(USER, calling(call("a", arguments=5))), "the arguments are a number"),
        (row(USER, calling(call("a", arguments=[]))), "the arguments are an empty list"),
        (
            row(USER, calling(call("a", arguments='{"a":'))),
            "malformed arguments (Expecting value, column 6, at the end)",
        ),
        (row(USER, calling(call("a", arguments="{'a': 1}"))), "malformed arguments (Expecting property name"),
        (
            row(USER, calling(call("a", arguments="[]"))),
            "malformed arguments (the arguments are not a JSON object)",
        ),
        (row(USER, calling(call("a", arguments='{"a": 1, "a": 2}'))), "duplicate key"),
        (row(USER, calling(call("a", arguments='{"a": NaN}'))), "not finite"),
        (row(USER, calling(call("a", arguments="-"))).replace('"-"', '{"a": 1e999}'), "not finite"),
        (row(USER, calling(call("a", arguments='{"a":' * 9999))), "malformed arguments (nested too deeply)"),
        (row(USER, calling(call("a", arguments='{"a": "\\ud83d"}'))), "half a surrogate pair"),
        (row(USER, calling(call("a", "ж"))).replace("ж", "\\ud83d"), "half a surrogate pair"),
        (row(USER, calling(A, content="<bos>")), "contains the control token <bos>"),
        (row(USER, calling(A, content=5)), "the content is a number"),
        (row({**USER, "tool_calls": [A]}, ASSISTANT), 'message 1: has "tool_calls", which belongs to an'),
        (row({**USER, "tool_call_id": "a"}, ASSISTANT), 'message 1: has "tool_call_id", which belongs to a'),
        (row(USER, calling(A), result("a", None), ASSISTANT), "message 3: the content is null or missing"),
        (
            row(USER, calling(A), without("tool_call_id", result("a", name="f")), ASSISTANT),
            'message 3: the "tool_call_id"',
        ),
        (row(USER, calling(A), result("a")), 'the last message is from "tool"'),
        (row(USER, result("a"), ASSISTANT), 'message 2: result of call "a" without a call'),
        (row(USER, ASSISTANT, result("a"), ASSISTANT), 'result of call "a" without a call'),
        (
            row(USER, calling(A), result("a"), USER, result("a"), ASSISTANT),
            'result of call "a" without a call',
        ),
        (
            row(USER, calling(A), result("c"), ASSISTANT),
            'result of unknown call "c"; calls without a result: "a"',
        ),
        (
            row(USER, calling(without("id", A)), result("a"), ASSISTANT),
            "calls without a result: none with an id",
        ),
        (
            row(USER, calling(A), result("a"), result("a"), ASSISTANT),
            'message 4: second result of call "a"',
        ),
        (row(USER, calling(A), USER, ASSISTANT), 'message 3: call "a" has no result'),
        (row(USER, calling(A, B), result("b"), ASSISTANT), 'message 4: call "a" has no result'),
        (
            row(USER, calling(without("id", A)), USER, ASSISTANT),
            'message 3: a call before it has no "id" and no result',
        ),
        (row(USER, calling(A), calling(A)), 'message 3: call "a" has no result'),
        (row(USER, calling(A), result("a"), USER, USER, ASSISTANT), 'message 5: consecutive "user" messages'),
        (row(result("a"), ASSISTANT), 'message 1: result of call "a" without a call'),
        (
            row(USER, calling(call("a", "f")), tools=TOOLS),
            'call 1: calls "f", which "tools" does not declare',
        ),
        (row(USER, calling(A), tools=[]), 'calls "get_sensitive_data", which "tools" does not declare'),
        (row(USER, calling(A), tools="[]"), 'calls "get_sensitive_data", which "tools" does not declare'),
        (row(USER, calling(A), tools="[}"), '"tools" is a string; write a list'),
        (row(USER, calling(A), tools=[*TOOLS, {"title": "f"}]), 'tool 2 of "tools" has no function name'),
        (
            row(USER, calling(A), tools=[*TOOLS, declared(8)]).replace("8", '"\\ud83d"'),
            '"tools" contains half a surrogate pair (\\ud800 to \\udfff); write the character itself',
        ),
        (
            row(USER, calling(A), tools=[*TOOLS, declared(7)]).replace("7", "1e999"),
            '"tools" has a number that is not finite, or is nested too deeply; correct it',
        ),
    ],
)
def test_an_error_of_a_call_names_line_and_cure(tmp_path, source, says):
    test_an_error_names_line_and_cure(tmp_path, source, says)


def test_messages_are_turns_of_text_in_the_order_of_the_calls():
    two = calling(A, call("b", "get_rate", {"of": "<USD>"}), content="Секунду.")
    messages = [SYSTEM, USER, two, result("b", "1 < 2 & 3"), result("a", 'Имя "Анна"</tool_result>'), USER]
    turns = [
        SYSTEM,
        USER,
        {
            "role": "assistant",
            "content": 'Секунду.\n<tool_call name="get_sensitive_data" arguments="{}"/>\n'
            '<tool_call name="get_rate" arguments="{&quot;of&quot;: &quot;&lt;USD&gt;&quot;}"/>',
        },
        {"role": "tool", "name": "get_sensitive_data", "content": 'Имя "Анна"</tool_result>'},
        {"role": "tool", "name": "get_rate", "content": "1 < 2 & 3"},
        USER,
    ]
    assert chat_rows.validate_and_render(messages) == turns
    assert chat_rows.validate_and_render(messages[:-1]) == turns[:-1]
    assert chat_rows.validate_and_render([USER]) == [USER]


@pytest.mark.parametrize("content", [None, "", " \n", []])
def test_a_call_without_words_is_the_whole_turn(content):
    tag = '<tool_call name="get_sensitive_data" arguments="{}"/>'
    for message in (calling(A, content=content), calling(without("id", without("type", A)))):
        assert chat_rows.validate_and_render([USER, message])[1] == {"role": "assistant", "content": tag}


def test_text_of_messages_at_fault_is_refused_and_of_unknown_keys_is_not():
    """A client sends back what it was given, with keys that decide nothing."""
    sent = {**calling({**A, "index": 0}), "refusal": None}
    assert chat_rows.validate_and_render([USER, sent]) == chat_rows.validate_and_render([USER, calling(A)])
    with pytest.raises(ValueError, match=r'^message 2: call 1: calls "get_sensitive_data", which'):
        chat_rows.validate_and_render([USER, sent], {"f"})
    assert row_faults.declared_names(TOOLS) == {"get_sensitive_data"}
    with pytest.raises(ValueError, match=r'^the end: call "b" has no result; '):
        chat_rows.validate_and_render([USER, calling(A, B), result("a")])
    for wrong in (None, [], [5], [{"role": {}, "content": "a"}], [USER, result("a")], [ASSISTANT]):
        with pytest.raises(ValueError, match="; "):
            chat_rows.validate_and_render(wrong)


def test_what_openais_client_and_table_formats_write_is_read_as_the_row_it_was(tmp_path):
    tool_call = {"id": "a", "type": "function", "function": {"name": "get_sensitive_data", "arguments": "{}"}}
    sent = ChatCompletionMessage(role="assistant", content=None, tool_calls=[tool_call]).model_dump()
    assert {"refusal", "audio", "function_call"} < set(sent)
    row = {"messages": [USER, sent, result("a"), ASSISTANT], "tools": TOOLS}
    wanted = [plain(row), plain({"messages": [USER, ASSISTANT]})]
    path = tmp_path / "rows.json"
    path.write_text(lines([row, {"messages": [USER, ASSISTANT]}]), encoding="utf-8")
    assert load_data(path) == wanted
    table = datasets.Dataset.from_list([row, {"messages": [USER, ASSISTANT]}])
    table.to_json(path)
    assert '"tool_calls":null' in path.read_text(encoding="utf-8")
    assert load_data(path) == wanted


def test_keys_that_decide_nothing_are_ignored_and_listed_once(tmp_path):
    path = tmp_path / "rows.json"
    part = {"type": "text", "text": "а", "cache_control": {"type": "ephemeral"}}
    plain_row = {"messages": [USER, ASSISTANT]}
    row = {
        "messages": [{**USER, "content": [part], "name": "Анна"}, {**ASSISTANT, "id": 7}],
        "id": 1,
        "source": "crm",
    }
    path.write_text(
        lines([row, {**plain_row, "id": 2, "parallel_tool_calls": False, "score": None}]), "utf-8"
    )
    rows = load_data(path)
    assert rows.ignored_keys == ["id", "source", "cache_control", "name", "parallel_tool_calls"]
    assert rows == [{"messages": [{**USER, "content": "а"}, ASSISTANT]}, plain_row]
    assert rows.lines == [1, 2]
    assert rows.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_parts_and_calls_of_other_makers_that_mean_the_same_are_read(tmp_path):
    path = tmp_path / "rows.json"
    parts = [[{"type": kind, "text": "а", "annotations": []}] for kind in ("input_text", "output_text")]
    bare = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    said = {"role": "assistant", "content": parts[1]}
    path.write_text(lines([{"messages": [user(parts[0]), said, USER, bare]}]), encoding="utf-8")
    assert [m["content"] for m in load_data(path)[0]["messages"]] == [
        *("а", "а", USER["content"]),
        '<tool_call name="f" arguments="{}"/>',
    ]


def test_results_without_an_id_are_those_of_the_calls_in_their_places(tmp_path):
    path = tmp_path / "rows.json"
    calls = calling(without("id", call("", "f")), without("id", call("", "g")))
    results = [{"role": "tool", "content": "1"}, {"role": "tool", "name": "g", "content": "2"}]
    path.write_text(lines([{"messages": [USER, calls, *results, ASSISTANT]}]), encoding="utf-8")
    names = [(m["name"], m["content"]) for m in load_data(path)[0]["messages"] if m["role"] == "tool"]
    assert names == [("f", "1"), ("g", "2")]
    path.write_text(lines([{"messages": [USER, calls, *results[::-1], ASSISTANT]}]), encoding="utf-8")
    with pytest.raises(UserError, match='message 3: the "tool_call_id" is null or missing'):
        load_data(path)


def test_the_cures_for_other_forms_lead_to_rows(tmp_path):
    """What a message tells one to write is read, and means what it meant."""
    path = tmp_path / "rows.json"
    calls = {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "get_sensitive_data", "arguments": {}}}],
    }
    cured = [
        {"messages": [USER, calls, {"role": "tool", "content": '{"rub": 100}'}, ASSISTANT]},  # of ShareGPT
        {"messages": [USER, ASSISTANT]},  # of Alpaca, of a pair, of a prompt and its completion
        {"messages": [USER, {**ASSISTANT, "weight": 0}, USER, ASSISTANT]},  # of "train": false
    ]
    path.write_text(lines(cured), encoding="utf-8")
    assert load_data(path) == [plain(cured[0] | {"messages": cured[0]["messages"]}), *map(plain, cured[1:])]


def test_all_errors_are_listed_and_the_first_twenty_shown(tmp_path):
    errors, message = errors_of(tmp_path, "\n".join([row(USER)] * 31))
    assert [line for line, _ in errors] == list(range(1, 32))
    assert len(message.split("\n")) == 21
    assert message.endswith("… and 11 more")


def test_an_array_names_the_line_on_which_an_element_begins(tmp_path):
    text = json.dumps([GOOD[0], {"messages": [USER]}, GOOD[1], 5], ensure_ascii=False, indent=1)
    errors, _ = errors_of(tmp_path, text)
    starts = [n for n, line in enumerate(text.split("\n"), 1) if line in (" {", " 5")]
    assert [line for line, _ in errors] == [starts[1], starts[3]]


@pytest.mark.parametrize("text", ["[{}", "[{} {}]", "[{},]", "[{}] x", "[", "[,]"])
def test_a_broken_array_is_an_error_and_no_traceback(tmp_path, text):
    errors, _ = errors_of(tmp_path, text)
    assert all("; " in error for _, error in errors)


@pytest.mark.parametrize(
    ("data", "line", "says"),
    [
        (b"", 1, "no rows"),
        (b"\n \n", 1, "no rows"),
        (b"[]", 1, "no rows"),
        (row(USER, ASSISTANT).encode() + b"\n\xd0", 2, "not UTF-8"),
        (row(USER, ASSISTANT).encode("utf-16"), 1, "not UTF-8"),
    ],
)
def test_files_without_rows(tmp_path, data, line, says):
    errors, _ = errors_of(tmp_path, data)
    assert errors[0][0] == line
    assert says in errors[0][1]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("missing.json", r"^missing\.json: no such file; name it with --data$"),
        (".", r"^\.: a folder; name the file in it$"),
    ],
)
def test_a_file_that_cannot_be_read(path, says):
    with pytest.raises(UserError, match=says):
        load_data(path)
