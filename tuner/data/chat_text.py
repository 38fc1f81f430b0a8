"""A conversation as text: whether it calls, how it is rendered, and the fingerprint to recognize it by."""

import hashlib
import re
import unicodedata
from collections import Counter

from tuner.data import tool_call

CALL_START = "<tool_call"  # a row whose last answer holds it is a call row
END_OF_TURN = "<end_of_turn>"
# Unicode's normalization is quadratic in a run of combining marks; no text has more than some at a letter.
LONG_RUN = re.compile(r"([^\w\s]{30})[^\w\s]+")


def is_call(messages):
    """Return whether a row's last answer is a call; validation rows are chosen and judged by it."""
    return CALL_START in messages[-1]["content"]


def has_call(messages):
    """Return whether any of a row's trained answers is a call."""
    return any(CALL_START in message["content"] for message in messages if is_trained(message))


def called_names(rows):
    """Return the names of the functions that the rows' trained answers call, the most frequent first."""
    texts = (m["content"] for row in rows for m in row["messages"] if is_trained(m))
    calls = (call for text in texts for call in tool_call.calls_in(text))
    return [name for name, _ in Counter(call.name for call in calls).most_common()]


def answer_fingerprints(messages):
    """Return the fingerprint of what each trained answer answers: of all turns before it."""
    fingerprints, digest = [], hashlib.sha256()
    for number, message in enumerate(messages):
        if is_trained(message):
            fingerprints.append(digest.hexdigest())
        digest.update(("\n" * (number > 0) + _normalized_turn(message)).encode("utf-8", "surrogatepass"))
    return fingerprints


def trained_prompts(messages):
    """Return [(turn, fingerprint), …] of all that a row's trained answers answer; turns count from 1.

    That is the conversation up to the turn, and a user's turn by itself, whatever came before it. By these,
    check.py and compare.py find what is trained on among the prompts that a model is judged by.
    """
    answers = [number for number, message in enumerate(messages) if is_trained(message)]
    prompts = list(zip(answers, answer_fingerprints(messages), strict=True))
    asked = [number for number in answers if number > 1 and messages[number - 1]["role"] == "user"]
    return prompts + [(number, fingerprint([messages[number - 1]])) for number in asked]


def message_text(message):
    """Return a message's text; parts are joined without a space, trimmed unless they are the system's."""
    content = message.get("content") or ""  # null beside tool_calls
    if isinstance(content, str):
        return content
    texts = [part["text"] for part in content]
    return "".join(texts if message.get("role") == "system" else map(str.strip, texts))


def normalize(text):
    """Return text in lower case, ё as е, punctuation and whitespace as single spaces."""
    text = unicodedata.normalize("NFKC", LONG_RUN.sub(r"\1", text)).lower().replace("ё", "е")
    return " ".join(re.sub(r"[^\w\s]", " ", text).split())


def fingerprint(messages):
    """Return the sha256 (hex) of a conversation's normalized turns: of what an answer answers."""
    text = "\n".join(map(_normalized_turn, messages))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _normalized_turn(message):
    return f"{message['role']}: {normalize(message['content'])}"


def render_messages(messages):
    """Do what chat_rows.validate_and_render does, for messages in the form of openai_shape, without fault."""
    turns = []
    for number, message in enumerate(messages, 1):
        text, calls = message_text(message), message.get("tool_calls") or []
        if message["role"] == "tool":
            continue
        tags = [call_tag(call) for call in calls]
        words = text.strip() if calls else text
        before_calls = [words] if words or not calls else []
        turn = {"role": message["role"], "content": "\n".join(before_calls + tags)}
        untrained = turn["role"] == "assistant" and not is_trained(message)
        turns.append({**turn, "weight": 0} if untrained else turn)
        if calls and number < len(messages):
            results = {m["tool_call_id"]: message_text(m) for m in messages[number : number + len(calls)]}
            for call in calls:
                name = call["function"]["name"]
                turns.append({"role": "tool", "name": name, "content": results[call["id"]]})
    return turns


def is_trained(message):
    """Return whether a message is an answer that is learned: the assistant's, unless its weight is 0."""
    return message["role"] == "assistant" and message.get("weight") != 0


def cut_after_answers(messages):
    """Return rendered messages without those after the last trained answer, from which nothing is learned."""
    last = max(i for i, message in enumerate(messages) if is_trained(message))
    return messages[: last + 1]


def call_tag(call):
    """Return one of OpenAI's tool_calls as text. Raise ValueError if it would not be read back."""
    return tool_call.format_call(call["function"]["name"], call["function"].get("arguments"))
