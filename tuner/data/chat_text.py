"""A conversation as text: whether it calls, how it is rendered, and the fingerprint to recognize it by."""

import hashlib
import re
import unicodedata

from tuner.data import tool_call

CALL_START = "<tool_call"  # a row whose last answer holds it is a call row
END_OF_TURN = "<end_of_turn>"


def is_call(messages):
    """Return whether a row's last answer is a call; validation rows are chosen and judged by it."""
    return CALL_START in messages[-1]["content"]


def has_call(messages):
    """Return whether any of a row's answers is a call."""
    return any(CALL_START in m["content"] for m in messages if m["role"] == "assistant")


def answer_fingerprints(messages):
    """Return the fingerprint of what each assistant turn answers; compare.py finds leaked rows by it."""
    return [fingerprint(messages[:i]) for i, m in enumerate(messages) if m["role"] == "assistant"]


def message_text(message):
    """Return a message's text; text parts are joined as Gemma's template does: trimmed, no space between."""
    content = message.get("content") or ""  # null beside tool_calls
    return content if isinstance(content, str) else "".join(part["text"].strip() for part in content)


def normalize(text):
    """Return text in lower case, ё as е, punctuation and whitespace as single spaces."""
    text = re.sub(r"[^\w\s]", " ", unicodedata.normalize("NFKC", text).lower().replace("ё", "е"))
    return " ".join(text.split())


def fingerprint(messages):
    """Return the sha256 (hex) of a conversation's normalized turns: of what an answer answers."""
    turns = [f"{message['role']}: {normalize(message['content'])}" for message in messages]
    return hashlib.sha256("\n".join(turns).encode("utf-8", "surrogatepass")).hexdigest()


def render_messages(messages):
    """Do what chat_rows.validate_and_render does, for messages without fault."""
    turns = []
    for number, message in enumerate(messages, 1):
        role, text, calls = message["role"], message_text(message), message.get("tool_calls") or []
        if role == "user" and turns and turns[-1]["role"] == "user":  # the results of calls
            turns[-1]["content"] += "\n" + text
        elif role != "tool":
            before_calls = [text] if text.strip() or not calls else []
            tags = [call_tag(call) for call in calls]
            turns.append({"role": role, "content": "\n".join(before_calls + tags)})
        if role == "assistant" and calls and number < len(messages):
            results = {m["tool_call_id"]: message_text(m) for m in messages[number : number + len(calls)]}
            lines = [tool_call.format_result(c["function"]["name"], results[c["id"]]) for c in calls]
            turns.append({"role": "user", "content": "\n".join(lines)})
    return turns


def call_tag(call):
    """Return one of OpenAI's tool_calls as text. Raise ValueError if it would not be read back."""
    return tool_call.format_call(call["function"]["name"], call["function"]["arguments"])
