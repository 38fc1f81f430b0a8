"""Rows to write tests with: of text, and legal ones in all the forms that a file may have."""

import json
from itertools import groupby
from xml.sax.saxutils import escape

CALL = '<tool_call name="get_sensitive_data" arguments="{}"/>'


def row(*texts):
    """Return a row of these texts, of user and assistant in turn."""
    roles = ["user", "assistant"] * (len(texts) // 2)
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]}


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
    """Return a row as it must come back, worked out another way: runs of messages, and XML's own escapes."""
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
        result_tags = [f'<tool_result name="{asked[i]}">{results[i]}</tool_result>' for i in asked if results]
        turns.append({"role": side, "content": "\n".join(result_tags + said)})
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
