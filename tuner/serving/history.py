"""A client's history as the messages that the chat template takes.

The rules for rows to train on are not those for what was said: a server that refuses its own answer, sent
back, has ended the conversation. What has one meaning is read so, the rest is refused.
"""

import math
import re
from collections import defaultdict, deque
from typing import NamedTuple

from tuner.data import openai_shape, row_faults, tool_call
from tuner.system.console import printable

ROLES = {**openai_shape.ROLE_NAMES, **{role: role for role in row_faults.KEYS}}
CONTROL_TOKEN = re.compile(rf"<(?=(?:{'|'.join(token[1:] for token in row_faults.CONTROL_TOKENS)}))")
TEXT_KEYS = {"text": "text", "refusal": "refusal"}  # of a part, by its type
UNSEEN_PARTS = ("thinking", "redacted_thinking", "reasoning")  # what a model thought it does not read again
NO_CALL = 'result of a call that is not among the messages; send the "assistant" message with the call too'


class Call(NamedTuple):
    id: str | int | None
    name: str
    place: int  # among the lines of its turn


class Turn:
    """What one side says: lines of text and calls; before a user's lines come the results of calls."""

    def __init__(self, role):
        self.role, self.lines, self.results = role, [], []  # results: (place of the call, name, content)

    def render(self):
        results = sorted(self.results, key=lambda result: result[0])
        messages = [{"role": "tool", "name": name, "content": text} for _, name, text in results]
        if self.lines or not messages:
            messages.append({"role": self.role, "content": "\n".join(self.lines)})
        return messages


class History:
    """The turns of a conversation, the user's and the assistant's alternating, from its messages in order."""

    def __init__(self):
        self.system, self.turns = [], []
        self.waiting = {}  # the calls of the last assistant turn that have no result, by place
        self.queues = defaultdict(deque)  # that turn's calls, by what a result may know of them
        self.known = {}  # the last call with each id

    def turn(self, role):
        """Return the last turn if it is this role's, otherwise a new one."""
        if role == "assistant" and not self.turns:  # a greeting, or a history whose beginning was cut off
            self.turns.append(Turn("user"))
        if not self.turns or self.turns[-1].role != role:
            self.turns.append(Turn(role))
            if role == "assistant":
                self.waiting.clear()
                self.queues.clear()
        return self.turns[-1]

    def add(self, message):
        """Add a message; raise ValueError if its meaning is not clear."""
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            shown = f'"{printable(role)}"' if isinstance(role, str) else "not a string"
            raise ValueError(f'the role is {shown}; use "system", "user", "assistant" or "tool"')
        role = ROLES[role]
        text = read_text(message, role)
        if role == "tool":
            self.add_result(message, text)
            return
        calls = list(read_calls(message)) if role == "assistant" else []
        text = text.strip() if calls else text
        lines = [CONTROL_TOKEN.sub("&lt;", text)] if text.strip() else []
        if role == "system" and not self.turns:
            self.system += lines
            return
        self.turn("assistant" if role == "assistant" else "user").lines += lines
        for call_id, name, tag in calls:
            call = Call(call_id, name, len(self.turns[-1].lines))
            self.turns[-1].lines.append(tag)
            self.waiting[call.place] = self.known[call_id] = call
            known_by = [("id", call_id)] if call_id is not None else [("no id", None), ("no id", name)]
            for key in [*known_by, ("any", None), ("any", name)]:
                self.queues[key].append(call)

    def add_result(self, message, text):
        """Add a result to the user's turn, unless its call was cut off with the beginning of the history."""
        call_id, name = read_id(message, "tool_call_id"), message.get("name")
        name = name if isinstance(name, str) and name else None
        call, place = self.find_call(call_id, name), math.inf
        if call and self.waiting.get(call.place) is call:
            place = self.waiting.pop(call.place).place
        if call or (name and len(self.turns) > 1):
            self.turn("user").results.append((place, call.name if call else name, text))
        elif self.turns:
            raise ValueError(NO_CALL)

    def find_call(self, call_id, name):
        """Return the call that a result answers, None if it is not known.

        It is the one with the result's id, or, where one of them has none, the next that waits for a result.
        """
        if call_id is None:
            return self.next_waiting("any", name)
        return self.next_waiting("id", call_id) or self.known.get(call_id) or self.next_waiting("no id", name)

    def next_waiting(self, *key):
        queue = self.queues[key]
        while queue and self.waiting.get(queue[0].place) is not queue[0]:
            queue.popleft()
        return queue[0] if queue else None

    def render(self):
        system = [{"role": "system", "content": "\n\n".join(self.system)}] if self.system else []
        return system + [message for turn in self.turns for message in turn.render()]


def render_history(messages):
    """Return a client's messages, a list of dicts, in the form that chat_rows.validate_and_render returns.

    Messages of one side that follow each other are joined, nothing said is an empty turn, a call may lack its
    result, keys and thoughts that no model reads are left out, < of a control token in a text becomes &lt;.
    Raise ValueError, `message 3: what is wrong; what to do`.
    """
    if not messages:
        raise ValueError('"messages" is an empty list; write at least a "user" message')
    history = History()
    for number, message in enumerate(messages, 1):
        try:
            history.add(message)
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from None
    role = history.turns[-1].role if history.turns else ROLES[message["role"]]
    if role == "tool":
        raise ValueError(f"message {number}: {NO_CALL}")
    if role != "user":
        raise ValueError(f'the last message is from "{role}"; it must be from "user" or "tool"')
    if not history.turns[-1].lines and not history.turns[-1].results:
        raise ValueError(f"message {number}: the content is empty; write the text")
    return history.render()


def read_text(message, role):
    """Return a message's text; parts are joined without a space, trimmed unless they are the system's."""
    content = message.get("content")
    if content is None and role == "assistant":
        content = message.get("refusal")
    if content is None and role != "user":
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError('the content is neither a string nor a list of {"type": "text", "text": …}')
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(TEXT_KEYS.get(kind)) if isinstance(kind, str) else part
        if isinstance(text, str):
            texts.append(text if role == "system" else text.strip())
        elif not (role == "assistant" and kind in UNSEEN_PARTS):
            raise ValueError(
                'a part of the content is not {"type": "text", "text": …}; only text is supported'
            )
    return "".join(texts)


def read_calls(message):
    """Yield (id, name, tag) of an assistant's tool_calls, or of its function_call, as that was once named."""
    calls = message.get("tool_calls")
    if not calls:
        calls = [{"function": message["function_call"]}] if message.get("function_call") else []
    if not isinstance(calls, list):
        raise ValueError(f'"tool_calls" is not a list; write a list of {row_faults.CALL_FORM}')
    for number, call in enumerate(calls, 1):
        call = call if isinstance(call, dict) else {}
        function = call.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name or (call.get("type") or "function") != "function":
            raise ValueError(
                f"call {number} is not one of a function with a name; write {row_faults.CALL_FORM}"
            )
        try:
            yield read_id(call, "id"), name, tag_of(name, function.get("arguments"))
        except ValueError as error:
            raise ValueError(f"call {number}: {error}") from None


def read_id(message, key):
    """Return an id, None where there is none; some clients write "" then."""
    if not isinstance(message.get(key), str | int | None):
        raise ValueError(f'the "{key}" is not a string; write the id that the call came with')
    return None if message.get(key) == "" else message.get(key)


def tag_of(name, arguments):
    """Return a call as text; arguments that are not JSON, another model's perhaps, stay as they are."""
    if not isinstance(arguments, str | dict | None):
        raise ValueError(f"{tool_call.NO_OBJECT}; write one, or one as a string")
    try:
        source = tool_call.format_arguments(tool_call.parse_arguments(arguments))
    except (ValueError, RecursionError):
        if not isinstance(arguments, str):
            raise ValueError("a number in the arguments is too large; write it as a string") from None
        source = arguments
    return tool_call.format_tag(name, source)
