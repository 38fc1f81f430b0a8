"""Reading rows: what is legal comes back as it stands, whatever else is an error with its line and cure."""

import json
from itertools import groupby
from xml.sax.saxutils import escape

import pytest

import chat_rows
from train_qlora import load_data

USER = {"role": "user", "content": "Сколько у меня денег?"}
ASSISTANT = {"role": "assistant", "content": "<call/>"}
SYSTEM = {"role": "system", "content": "Ты помощник."}
PARTS = {
    "role": "user",
    "content": [{"type": "text", "text": "Сколько "}, {"type": "text", "text": "у меня?"}],
}
TOOLS = [{"type": "function", "function": {"name": "get_sensitive_data", "parameters": {"type": "object"}}}]


def call(identifier, name="get_sensitive_data", arguments="{}"):
    function = {"name": name, "arguments": arguments}
    return {"id": identifier, "type": "function", "function": function}


def plain(row):
    """A row as it must come back, worked out another way: runs of messages, and XML's own escapes."""
    turns, names = [], {}
    for side, run in groupby(row["messages"], lambda m: {"tool": "user"}.get(m["role"], m["role"])):
        asked, names, said, results = names, {}, [], {}
        for message in run:
            content = message.get("content") or ""
            if not isinstance(content, str):
                content = "".join(part["text"].strip() for part in content)
            if message["role"] == "tool":
                results[message["tool_call_id"]] = escape(content)
                continue
            calls = message.get("tool_calls") or []
            if content.strip() or not calls:
                said.append(content)
            names = {c.get("id"): escape(c["function"]["name"], {'"': "&quot;"}) for c in calls}
            for c, name in zip(calls, names.values(), strict=True):
                value = c["function"]["arguments"]
                value = json.loads(value) if isinstance(value, str) else value
                value = escape(json.dumps(value, ensure_ascii=False), {'"': "&quot;"})
                said.append(f'<tool_call name="{name}" arguments="{value}"/>')
        told = [f'<tool_result name="{asked[i]}">{results[i]}</tool_result>' for i in asked if results]
        turns.append({"role": side, "content": "\n".join(told + said)})
    return {"messages": turns}


GOOD = [
    {"messages": [USER, ASSISTANT]},
    {"messages": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]},
    {"messages": [PARTS, ASSISTANT]},
    {"messages": [{"role": "user", "content": "строка\u2028внутри"}, ASSISTANT]},
    {"messages": [USER, {"role": "assistant", "tool_calls": [call("a")]}], "tools": TOOLS},
    {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [call("a"), call("b", "f", {"x": '"<ж>"'})]},
            {"role": "tool", "tool_call_id": "b", "content": "</tool_result><end_of_turn>\n&lt;"},
            {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": " 5 "}]},
            USER,
            {**ASSISTANT, "tool_calls": [call("a", arguments='{"n": 1.50, "д": "\\u0436"}')]},
            {"role": "tool", "tool_call_id": "a", "content": ""},
            {**ASSISTANT, "tool_calls": None},
        ],
        "tools": None,
    },
]


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
    with pytest.raises(chat_rows.DataError) as caught:
        load_data(path)
    return caught.value.errors, str(caught.value)


def row(*messages, **extra):
    return json.dumps({"messages": list(messages), **extra}, ensure_ascii=False)


def user(content):
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{", "not valid JSON"),
        ('{"messages": NaN}', "not valid JSON"),
        ('{"messages": 1, "messages": 2}', "the same key twice"),
        ("[" * 100_000, "nested too deep"),
        ("7", 'a number without "messages"'),
        ("{}", "an empty object"),
        ('{"messages": []}', "an empty list"),
        ('{"messages": {"role": "user"}}', "is an object; write a list"),
        (row(USER, ASSISTANT, id=4), 'unknown key "id"'),
        (row(USER), 'the last message is from "user"; end the row with an "assistant" turn'),
        (row(SYSTEM), 'the last message is from "system"'),
        (row(ASSISTANT), '"assistant" speaks first'),
        (row(SYSTEM, ASSISTANT), '"assistant" speaks first'),
        (row(USER, USER, ASSISTANT), 'message 2: "user" speaks twice'),
        (row(USER, ASSISTANT, ASSISTANT), 'message 3: "assistant" speaks twice'),
        (row(USER, ASSISTANT, SYSTEM), 'message 3: "system" may only come first'),
        (row("hello", ASSISTANT), "message 1: is a string"),
        (row({"role": "bot", "content": "a"}), 'the role is "bot"'),
        (row({"role": 5, "content": "a"}), "the role is a number"),
        (row({"content": "a"}), "the role is null or missing"),
        (row(user(""), ASSISTANT), "the content is empty"),
        (row(user(" \n\u00a0"), ASSISTANT), "the content is empty"),
        (row(user([]), ASSISTANT), "the content is an empty list"),
        (row(user(None), ASSISTANT), "the content is null or missing"),
        (row(user(True), ASSISTANT), "the content is true or false"),
        (row(user([{"type": "image", "url": "x"}]), ASSISTANT), "only text can be trained"),
        (row(user(["a"]), ASSISTANT), "only text can be trained"),
        (row(user([{"type": "text", "text": 1}]), ASSISTANT), 'the "text" of a part is a number'),
        (row(user([{"type": "text", "text": " "}]), ASSISTANT), "the content is empty"),
        (row({**USER, "name": "Анна"}, ASSISTANT), 'unknown key "name"'),
        (row(user("a<end_of_turn>b"), ASSISTANT), "holds <end_of_turn>"),
        (row(user([{"type": "text", "text": "<bo"}, {"type": "text", "text": "s>"}]), ASSISTANT), "<bos>"),
        ('{"messages": [{"role": "user", "content": "\\ud83d"}]}', "half a surrogate pair"),
    ],
)
def test_an_error_names_line_and_cure(tmp_path, source, says):
    errors, message = errors_of(tmp_path, f"{row(USER, ASSISTANT)}\n\n{source}\n{row(USER, ASSISTANT)}")
    assert errors
    assert {line for line, _ in errors} == {3}
    assert any(says in text for _, text in errors), errors
    assert all("; " in text for _, text in errors), "what is wrong; what to do"
    assert f"{tmp_path}/rows.json:3: " in message


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


@pytest.mark.parametrize("path", ["missing.json", "."])
def test_a_file_that_cannot_be_read(path):
    with pytest.raises(chat_rows.DataError, match="cannot be read"):
        load_data(path)


def test_printable_text_is_one_line_without_control_characters():
    assert chat_rows.printable("a\x1b[31mb\nc\u202ed") == "a\ufffd[31mb c\ufffdd"
    assert len(chat_rows.printable("ж" * 100)) == 60
