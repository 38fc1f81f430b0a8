"""What a row of chat messages may be, and where exactly one is not."""

import unicodedata
from collections import Counter

from tuner.data import chat_text, json_lines
from tuner.system.console import printable

KEYS = {  # of a message, by its role
    "system": ("role", "content"),
    "user": ("role", "content"),
    "assistant": ("role", "content", "tool_calls"),
    "tool": ("role", "content", "tool_call_id"),
}
# Read as the structure of a conversation wherever they stand, so no text may hold one.
CONTROL_TOKENS = (
    "<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>",
    "<start_of_image>", "<end_of_image>", "<image_soft_token>",
)  # fmt: skip


def faults_of_row(row):
    """Yields what is wrong with a row, and what to do about it."""
    if not isinstance(row, dict) or "messages" not in row:
        yield (
            f'the row is {_kind(row)} without "messages"; '
            'write {"messages": [{"role": …, "content": …}, …]}'
        )
        return
    for key in row:
        if key not in ("messages", "tools"):
            yield f'unknown key "{printable(key)}" beside "messages"; take it out, nothing would read it'
    try:
        names = declared_names(row.get("tools"))
    except ValueError as error:
        yield str(error)
        names = None
    last = yield from conversation_faults(row["messages"], names)
    if last not in (None, "assistant"):
        yield f'the last message is from "{last}"; end the row with an "assistant" turn'


def declared_names(tools):
    """Returns the set of names that OpenAI's `tools` declare, None if it is null. Raises ValueError."""
    if tools is None:
        return None
    form = '{"type": "function", "function": {"name": …}}'
    if not isinstance(tools, list):
        raise ValueError(f'"tools" is {_kind(tools)}; write a list of {form}')
    for number, tool in enumerate(tools, 1):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f'number {number} of "tools" declares no function by name; write {form}')
    return {tool["function"]["name"] for tool in tools}


def conversation_faults(messages, names=None, strict=True):
    """Yields what is wrong with messages, in order; returns the last one's role, None if that cannot be told.

    names: of the tools that may be called, None for any. strict: whether an unknown key is a fault.
    """
    if not isinstance(messages, list) or not messages:
        yield f'"messages" is {_kind(messages)}; write a list of at least a "user" and an "assistant" message'
        return None
    before, waiting, answered = None, [], []  # the ids of the last assistant's calls, without and with result
    for number, message in enumerate(messages, 1):
        faults = list(_message_faults(message, names, strict))
        yield from (f"message {number}: {fault}" for fault in faults)
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in KEYS:
            return None  # the order of turns cannot be told
        if role == "tool":
            if faults:
                return None  # nor what is answered
            known = message["tool_call_id"]
            if known not in waiting:
                yield f"message {number}: {_stray(known, waiting, answered)}"
                return None
            waiting.remove(known)
            answered.append(known)
            before = role
            continue
        if waiting:
            yield f"message {number}: {_unanswered(waiting)}"
            return None
        if role == "system" and number > 1:
            yield f'message {number}: "system" may only come first; move it to the start of the row'
            return None
        if role == "assistant" and before in (None, "system"):
            yield f'message {number}: "assistant" speaks first; put a "user" message before it'
            return None
        if role == before:
            yield f'message {number}: "{role}" speaks twice in a row; join the two, turns alternate'
            return None
        before, waiting, answered = role, [], []
        if role == "assistant" and message.get("tool_calls") is not None:
            if faults:
                return None
            waiting = [call.get("id") for call in message["tool_calls"]]
    if before == "tool" and waiting:
        yield f"the end: {_unanswered(waiting)}"
    return before


def _stray(known, waiting, answered):
    """Says what is wrong with a result of the call `known` where none waits for it."""
    shown = printable(known)
    if known in answered:
        return f'a second result of the call "{shown}"; keep one'
    if not waiting:
        return f'the result of a call "{shown}", and none is before it; put it after the message that calls'
    ids = ", ".join(f'"{printable(i)}"' for i in waiting if i is not None) or "none with an id"
    return f'the result of a call "{shown}", which was not made; the calls before it: {ids}'


def _unanswered(waiting):
    if None in waiting:
        return 'a call before it has neither "id" nor result; give it both, or end with the call'
    shown = printable(waiting[0])
    return f'the call "{shown}" has no result; put a "tool" message before it, or end with the call'


def _message_faults(message, names, strict):
    if not isinstance(message, dict):
        yield f'is {_kind(message)}; write {{"role": …, "content": …}}'
        return
    if not {"role", "content"} & set(message):
        yield f'is {_kind(message)} without "role" and "content"; write {{"role": …, "content": …}}'
        return
    role = message.get("role")
    if not isinstance(role, str) or role not in KEYS:
        shown = f'"{printable(role)}"' if isinstance(role, str) else _kind(role)
        yield f'the role is {shown}; use "system", "user", "assistant" or "tool"'
        role = "user"  # what else is wrong with it
    yield from _unknown(message, KEYS[role], strict)
    if role == "tool" and not isinstance(message.get("tool_call_id"), str):
        found = _kind(message.get("tool_call_id"))
        yield f'the "tool_call_id" is {found}; write the "id" of the call that this is the result of'
    calls = message.get("tool_calls") if role == "assistant" else None
    if calls is not None:
        faults = list(_calls_faults(calls, names, strict))
        yield from faults
        if faults:
            return
    content = message.get("content")
    if isinstance(content, list) and content:
        for part in content:
            if not (isinstance(part, dict) and set(part) == {"type", "text"} and part["type"] == "text"):
                yield 'a part of the content is not {"type": "text", "text": …}; only text can be read'
                return
            if not isinstance(part["text"], str):
                yield f'the "text" of a part is {_kind(part["text"])}; write a string'
                return
    elif not isinstance(content, str) and not (calls and content in (None, [])):
        yield f'the content is {_kind(content)}; write a string, or a list of {{"type": "text", "text": …}}'
        return
    text = chat_text.message_text(message)
    if not text.strip() and not calls and role != "tool":
        yield "the content is empty; write the text, or leave it out"
    for token in CONTROL_TOKENS:
        if token in text and role != "tool":  # in a result it is escaped
            yield f"the content holds {token}, which the model reads as a control token; take it out"
    if any(unicodedata.category(c) == "Cs" for c in text + "".join(map(chat_text.call_tag, calls or []))):
        yield "the content holds half a surrogate pair (\\ud800 to \\udfff); write the character itself"


def _calls_faults(calls, names, strict):
    """Yields what is wrong with the tool_calls of a message."""
    form = '{"id": …, "type": "function", "function": {"name": …, "arguments": "{}"}}'
    if not isinstance(calls, list) or not calls:
        yield f'"tool_calls" is {_kind(calls)}; write a list of {form}, or take it out'
        return
    ids = Counter()
    for number, call in enumerate(calls, 1):
        at = f"call {number}"
        if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
            yield f'{at}: is {_kind(call)} without "function"; write {form}'
            continue
        function = call["function"]
        for fault in _unknown(call, ("id", "type", "function"), strict):
            yield f"{at}: {fault}"
        for fault in _unknown(function, ("name", "arguments"), strict):
            yield f"{at}: {fault}"
        if call.get("type", "function") != "function":
            yield f'{at}: the type is not "function"; nothing else can be called'
        if call.get("id") is not None:
            if not isinstance(call["id"], str):
                yield f'{at}: the "id" is {_kind(call["id"])}; write a string'
                continue
            ids[call["id"]] += 1
            if ids[call["id"]] == 2:
                yield f'{at}: the "id" "{printable(call["id"])}" is another call\'s too; give it its own'
        name, arguments = function.get("name"), function.get("arguments")
        if not isinstance(name, str) or not name:
            yield f"{at}: the name is {_kind(name) if name != '' else 'empty'}; write the function's"
            continue
        if names is not None and name not in names:
            yield f'{at}: calls "{printable(name)}", which "tools" does not declare; declare it, or mend it'
        if not isinstance(arguments, (str, dict)):
            yield f'{at}: the arguments are {_kind(arguments)}; write a JSON object, or "{{}}"'
            continue
        try:
            chat_text.call_tag(call)
        except (ValueError, RecursionError) as error:
            reason = json_lines.describe_json_error(error)
            yield f"{at}: the arguments cannot be read ({reason}); write a JSON object, or one in a string"


def _unknown(found, known, strict):
    for key in found:
        if strict and key not in known:
            yield f'unknown key "{printable(key)}"; take it out, nothing would read it'


def _kind(value):
    if isinstance(value, (list, dict)) and not value:
        return "an empty " + ("list" if isinstance(value, list) else "object")
    kinds = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
        type(None): "null or missing",
    }
    return kinds.get(type(value), "a number")
