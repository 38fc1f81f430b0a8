"""Rows to write tests with: of text, and legal ones in all the forms that a file may have."""

import json
import shutil
from itertools import groupby
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[2]
CALL = '<tool_call name="get_sensitive_data" arguments="{}"/>'
# The shipped probes: what each asks, and whether it needs the call.
PROBES = [
    (messages[0]["content"], messages[1]["content"] == CALL)
    for line in (ROOT / "probes.json").read_text(encoding="utf-8").splitlines()
    for messages in [json.loads(line)["messages"]]
]


def copy_questions(folder):
    """Copy the shipped probes and held-out rows into a folder."""
    for name in ("probes.json", "heldout.json"):
        shutil.copy(ROOT / name, folder)


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
    messages, calls = [], []
    for is_result, run in groupby(row["messages"], lambda message: message["role"] in ("tool", "function")):
        run = list(run)
        if is_result:
            ids = [call.get("id") for call in calls]
            places = [ids.index(m["tool_call_id"]) if m.get("tool_call_id") else i for i, m in enumerate(run)]
            for place in sorted(range(len(run)), key=places.__getitem__):
                name = calls[places[place]]["function"]["name"]
                messages.append({"role": "tool", "name": name, "content": text_of(run[place])})
            continue
        for message in run:
            calls = message.get("tool_calls") or []
            if message.get("function_call"):
                calls = [{"function": message["function_call"]}]
            said = [text_of(message)] if text_of(message).strip() or not calls else []
            role = "system" if message["role"] == "developer" else message["role"]
            turn = {"role": role, "content": "\n".join(said + [tag_of(c["function"]) for c in calls])}
            messages.append(
                {**turn, "weight": 0} if role == "assistant" and message.get("weight") == 0 else turn
            )
    while messages[-1]["role"] != "assistant" or "weight" in messages[-1]:
        messages.pop()
    tools = row.get("functions") if row.get("tools") is None else row["tools"]
    tools = json.loads(tools) if isinstance(tools, str) else tools
    if tools is None:
        return {"messages": messages}
    wrapped = [t if "function" in t else {"type": "function", "function": t} for t in tools]
    return {"messages": messages, "tools": wrapped}


def text_of(message):
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"].strip() for part in content)


def tag_of(function):
    value = function.get("arguments") or {}
    value = json.loads(value) if isinstance(value, str) and value.strip() else value or {}
    value = escape(json.dumps(value if isinstance(value, dict) else {}, ensure_ascii=False), {'"': "&quot;"})
    name = escape(function["name"], {'"': "&quot;"})
    return f'<tool_call name="{name}" arguments="{value}"/>'


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
    {
        "messages": [
            {"role": "developer", "content": "Кратко.", "name": None},
            {**USER, "tool_calls": None, "tool_call_id": None, "name": "Анна"},
            {
                "role": "assistant",
                "function_call": {"name": "f", "arguments": ""},
                "tool_calls": [],
                "refusal": None,
            },
            {"role": "function", "name": "f", "content": "5"},
            {**ASSISTANT, "weight": 0, "audio": None},
            USER,
            {
                "role": "assistant",
                "tool_calls": [{**call("a", arguments=None), "index": 0}],
                "annotations": [],
            },
            {"role": "tool", "name": "get_sensitive_data", "content": "<b>"},
            {**ASSISTANT, "weight": 1},
            USER,
            {**ASSISTANT, "weight": 0},
        ],
        "functions": [{"name": "f"}, {"name": "get_sensitive_data"}],
        "id": 7,
        "parallel_tool_calls": False,
    },
    {"messages": [USER, {"role": "assistant", "tool_calls": [call("a")]}], "tools": json.dumps(TOOLS)},
]
