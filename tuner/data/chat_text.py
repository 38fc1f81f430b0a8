"""The text of a conversation: what of it is learned, and the fingerprint that it is known again by."""

import hashlib
import re
import unicodedata

from tuner.data import tool_call

CALL_START = "<tool_call"  # a row whose last answer holds it is a call row
END_OF_TURN = "<end_of_turn>"


def is_call(messages):
    """Whether a row's last answer is a call: what it is held out and judged by."""
    return CALL_START in messages[-1]["content"]


def has_call(messages):
    """Whether a row teaches a call, in any of its answers."""
    return any(CALL_START in m["content"] for m in messages if m["role"] == "assistant")


def answer_fingerprints(messages):
    """Returns the sha256 of what each assistant turn of a row answers, so that compare.py knows it again."""
    return [fingerprint(messages[:i]) for i, m in enumerate(messages) if m["role"] == "assistant"]


def message_text(message):
    """Returns a message's text; text parts are put together as Gemma's template does: trimmed, unspaced."""
    content = message.get("content") or ""  # null beside tool_calls
    return content if isinstance(content, str) else "".join(part["text"].strip() for part in content)


def normalize(text):
    """Returns text in lower case, ё as е, punctuation and blanks as single spaces."""
    text = re.sub(r"[^\w\s]", " ", unicodedata.normalize("NFKC", text).lower().replace("ё", "е"))
    return " ".join(text.split())


def fingerprint(messages):
    """Returns the sha256 (hex) of a conversation's normalised turns: of what an answer is asked for."""
    turns = [f"{message['role']}: {normalize(message['content'])}" for message in messages]
    return hashlib.sha256("\n".join(turns).encode("utf-8", "surrogatepass")).hexdigest()


def render_messages(messages):
    """Does what as_text does for messages without fault."""
    turns = []
    for place, message in enumerate(messages, 1):
        role, text, calls = message["role"], message_text(message), message.get("tool_calls") or []
        if role == "user" and turns and turns[-1]["role"] == "user":  # which is the results
            turns[-1]["content"] += "\n" + text
        elif role != "tool":
            said = [text] if text.strip() or not calls else []
            turns.append({"role": role, "content": "\n".join(said + [call_tag(call) for call in calls])})
        if role == "assistant" and calls and place < len(messages):
            results = {m["tool_call_id"]: message_text(m) for m in messages[place : place + len(calls)]}
            lines = [tool_call.format_result(c["function"]["name"], results[c["id"]]) for c in calls]
            turns.append({"role": "user", "content": "\n".join(lines)})
    return turns


def call_tag(call):
    return tool_call.format_call(call["function"]["name"], call["function"]["arguments"])
