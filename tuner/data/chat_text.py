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


def fingerprints(messages):
    """Returns the sha256 of what each assistant turn of a row answers, so that compare.py knows it again."""
    return [fingerprint(messages[:i]) for i, m in enumerate(messages) if m["role"] == "assistant"]


def text_of(message):
    """Returns a message's text; text parts are put together as Gemma's template does: trimmed, unspaced."""
    content = message.get("content") or ""  # null beside tool_calls
    return content if isinstance(content, str) else "".join(part["text"].strip() for part in content)


def normalised(text):
    """Returns text in lower case, ё as е, punctuation and blanks as single spaces."""
    text = re.sub(r"[^\w\s]", " ", unicodedata.normalize("NFKC", text).lower().replace("ё", "е"))
    return " ".join(text.split())


def fingerprint(messages):
    """Returns the sha256 (hex) of a conversation's normalised turns: of what an answer is asked for."""
    turns = [f"{message['role']}: {normalised(message['content'])}" for message in messages]
    return hashlib.sha256("\n".join(turns).encode("utf-8", "surrogatepass")).hexdigest()


def rendered(messages):
    """Does what as_text does for messages without fault."""
    turns = []
    for place, message in enumerate(messages, 1):
        role, text, calls = message["role"], text_of(message), message.get("tool_calls") or []
        if role == "user" and turns and turns[-1]["role"] == "user":  # which is the results
            turns[-1]["content"] += "\n" + text
        elif role != "tool":
            said = [text] if text.strip() or not calls else []
            turns.append({"role": role, "content": "\n".join(said + [tag_of(call) for call in calls])})
        if role == "assistant" and calls and place < len(messages):
            results = {m["tool_call_id"]: text_of(m) for m in messages[place : place + len(calls)]}
            lines = [tool_call.write_result(c["function"]["name"], results[c["id"]]) for c in calls]
            turns.append({"role": "user", "content": "\n".join(lines)})
    return turns


def tag_of(call):
    return tool_call.write(call["function"]["name"], call["function"]["arguments"])
