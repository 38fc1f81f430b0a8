"""Files of probes and held-out rows: what they ask, what they expect, and what is wrong with them."""

import json
from pathlib import Path

import pytest

from tests.support.rows import ASSISTANT, CALL, USER, call, row
from tuner.data.tool_call import Call, format_call
from tuner.inference import probes
from tuner.system.errors import UserError


def tool(name, **function):
    return {"type": "function", "function": {"name": name, **function}}


def bare(name):
    return tool(name, parameters={"type": "object", "properties": {}})


def write(path, *rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_the_turns_before_the_last_answer_are_asked_and_the_answer_is_due(tmp_path):
    result = {"role": "tool", "tool_call_id": "a", "content": "<5>"}
    calling = {
        "role": "assistant",
        "content": "Секунду.",
        "tool_calls": [call("a", "f", '{"b": {"c": [1]}}')],
    }
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Ты банк."},
                USER,
                calling,
                result,
                ASSISTANT,
                USER,
                calling,
            ]
        },
        {"messages": [USER, {**ASSISTANT, "content": " Да.\n"}, USER, {**ASSISTANT, "weight": 0}]},
        {"messages": [USER, {"role": "assistant", "tool_calls": [call("a", "f"), call("b", "g")]}]},
    ]
    path = tmp_path / "rows.json"
    path.write_text("[\n" + ",\n\n".join(map(json.dumps, rows)) + "]", encoding="utf-8")
    questions = probes.load_questions(path)
    f, g = format_call("f", {"b": {"c": [1]}}), format_call("f", {}) + "\n" + format_call("g", {})
    assert (questions.path, questions.lines) == (str(path), [2, 4, 6])
    assert questions.answers == [f"Секунду.\n{f}", "Да.", g]
    made = Call("f", {"b": {"c": [1]}}, ())
    assert questions.expected == [([made], True), None, ([Call("f", {}, ()), Call("g", {}, ())], False)]
    roles = [[message["role"] for message in messages] for messages in questions.conversations]
    assert roles == [["system", "user", "assistant", "tool", "assistant", "user"], ["user"], ["user"]]
    assert questions.conversations[0][2:4] == [
        {"role": "assistant", "content": f"Секунду.\n{f}"},
        {"role": "tool", "name": "f", "content": "<5>"},
    ]


def test_an_answer_may_be_as_long_as_the_rows_own_needs(tmp_path):
    long = format_call("f", {"a": "б" * 200})
    rows = [row("?", text) for text in (CALL, long, f"Вот:\n{CALL}\n{CALL}", "Да.", "а" * 160, "а" * 162)]
    limits = probes.load_questions(write(tmp_path / "rows.json", *rows)).max_new_tokens
    assert limits == [80, len(long), 6 + 2 * len(CALL), 80, 80, 81]


def test_tools_are_declared_ones_first_then_those_that_are_only_called(tmp_path):
    first, other = tool("f", description="1", strict=None, parameters={"a": None}), tool("f", description="2")
    one = write(
        tmp_path / "one.json",
        row("?", format_call("h", {}), "?", format_call("g", {})),
        {**row("?", format_call("f", {})), "tools": [{"function": first["function"]}, other]},
        {**row("?", "Да."), "functions": [{"name": "i"}]},
        {**row("?", "<tool_call name='k' arguments='{}'> и x", "?", format_call("g", {}))},
    )
    declared = tool("f", description="1", parameters={"a": None})
    questions = probes.load_questions(one)
    assert questions.tools == [declared, bare("i"), bare("h"), bare("g"), bare("k")]
    two = write(tmp_path / "two.json", {**row("?", "Да."), "tools": [tool("h", description="3"), other]})
    more = probes.load_questions(two)
    merged = probes.merge_tools(questions, more)
    assert [one["function"].get("description") for one in merged if one["function"]["name"] in "fh"] == [
        "1",
        "3",
    ]
    assert sorted(one["function"]["name"] for one in merged) == list("fghik")


def test_all_faults_of_all_files_are_listed_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("good.json"), row("?", CALL))
    write(Path("a.json"), row("?", CALL), {"messages": []}, row("?", "<tool_call name='f'/>"), 5)
    write(Path("b.json"), row("?", CALL[:-1]))
    pairs = [(name, "--data") for name in ("good.json", "a.json", "b.json", "a.json")]
    with pytest.raises(UserError) as error:
        probes.load_all(*pairs, ("none.json", "--probes"))
    places = [line.split(": ")[0] for line in str(error.value).splitlines()]
    assert places == ["a.json:2", "a.json:3", "a.json:4", "b.json:1", "none.json"]
    assert str(error.value).endswith("none.json: no such file; name it with --probes")
    with pytest.raises(UserError, match=r"^none.json: no such file; name it with --x$"):
        probes.load_all(("good.json", "--data"), ("none.json", "--x"))
    good, again = probes.load_all(("good.json", "--data"), ("good.json", "--probes"))
    assert good == again
