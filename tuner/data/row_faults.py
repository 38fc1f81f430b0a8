"""Check a row of chat messages: what exactly is wrong, in which message, and how to fix it."""

import json
import unicodedata
from collections import Counter

from tuner.data import chat_text, json_lines, openai_shape, tool_call
from tuner.system.console import printable

SHOWN_IDS = 3  # of calls, in a message about one
KEYS = {  # of a message, by its role
    "system": ("role", "content"),
    "user": ("role", "content"),
    "assistant": ("role", "content", "tool_calls", "weight"),
    "tool": ("role", "content", "tool_call_id"),
}
OTHER_ROLES = {
    **dict.fromkeys(("model", "gpt", "bot", "ai"), "assistant"),
    **dict.fromkeys(("observation", "ipython"), "tool"),
    "human": "user",
}
OTHER_PARTS = {  # of a message's content: what to do about each type
    "tool_use": 'write it in the "tool_calls" of the message',
    "tool_result": 'write it as a message of the role "tool"',
    "thinking": openai_shape.MEANING["thinking"],
}
CALL_FORM = '{"id": …, "type": "function", "function": {"name": …, "arguments": "{}"}}'
HALF_PAIR = "half a surrogate pair (\\ud800 to \\udfff); write the character itself"
TURN = '{"role": …, "content": …}'
# What other forms of rows begin with, and how each is written here.
OTHER_FORMS = {
    "conversations": "ShareGPT's form; rename \"conversations\" to \"messages\", \"value\" to \"content\", "
    '"from" to "role" (human is "user", gpt "assistant", observation "tool"), and write a function_call as '
    'the "tool_calls" of an "assistant"',
    "instruction": "Alpaca's form; write \"instruction\" and \"input\" as a \"user\" message, "
    '"output" as an "assistant" message',
    "chosen": 'a preference pair (DPO); write the prompt and the chosen answer as "messages"',
    "preferred_output": 'a preference pair (DPO); write "input" and "preferred_output" as "messages"',
    "completion": 'a prompt and its completion; write them as a "user" and an "assistant" message',
    "contents": "Gemini's form; rename \"contents\" to \"messages\", \"parts\" to \"content\", the role "
    '"model" to "assistant"',
    "question": 'a question and its answer; write them as a "user" and an "assistant" message',
    "body": 'a request of a batch; write the messages of its "body", and the answer to them, as "messages"',
}  # fmt: skip
# The tokenizer reads these as structure wherever they are, so no text may contain one.
CONTROL_TOKENS = (
    "<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>",
    "<start_of_image>", "<end_of_image>", "<image_soft_token>",
)  # fmt: skip


def faults_of_row(row):
    """Yield each fault of a row, in the form of openai_shape, as text: what is wrong; what to do."""
    if not isinstance(row, dict) or "messages" not in row:
        yield _other_form(row)
        return
    for cure, key in openai_shape.meaning_keys(row, openai_shape.ROW_MEANING).items():
        yield f'has "{key}" beside "messages": {cure}'
    try:
        names = declared_names(row.get("tools"))
    except ValueError as error:
        yield str(error)
        names = None
    last = yield from conversation_faults(row["messages"], names)
    if last not in (None, "assistant"):
        yield f'the last message is from "{last}"; end the row with an "assistant" turn'
    answers = [message for message in row["messages"] if message["role"] == "assistant"] if last else []
    if answers and not any(map(chat_text.is_trained, answers)):
        yield 'every "weight" is 0, so nothing of the row is trained; remove the row, or one "weight"'


def _other_form(row):
    """Return what a value is that has no messages, and how to write it as a row."""
    if isinstance(row, dict):
        form = next((text for key, text in OTHER_FORMS.items() if key in row), None)
        if form:
            return f'the row has no "messages", it is {form}'
    return f'the row is {_kind(row)} without "messages"; write {{"messages": [{TURN}, …]}}'


def declared_names(tools):
    """Return the names that OpenAI's `tools` declare, None if it is null. Raise ValueError for a fault."""
    if tools is None:
        return None
    form = '{"type": "function", "function": {"name": …}}'
    if not isinstance(tools, list):
        raise ValueError(f'"tools" is {_kind(tools)}; write a list of {form}')
    for number, tool in enumerate(tools, 1):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f'tool {number} of "tools" has no function name; write {form}')
    try:
        text = json.dumps(tools, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        raise ValueError(
            '"tools" has a number that is not finite, or is nested too deeply; correct it'
        ) from None
    if tool_call.SURROGATE.search(text):
        raise ValueError(f'"tools" contains {HALF_PAIR}')
    return {tool["function"]["name"] for tool in tools}


def conversation_faults(messages, names=None):
    """Yield the faults of messages, in order; return the last one's role, None if it is not known.

    names: of the tools that may be called, None for any.
    """
    if not isinstance(messages, list) or not messages:
        cure = 'a list of at least a "user" and an "assistant" message'
        cure = "the list itself, not its JSON in a string" if isinstance(messages, str) else cure
        yield f'"messages" is {_kind(messages)}; write {cure}'
        return None
    # previous: a role. pending, answered: ids of the last assistant's calls, without and with a result.
    previous, pending, answered = None, {}, set()
    for number, message in enumerate(messages, 1):
        faults = list(_message_faults(message, names))
        yield from (f"message {number}: {fault}" for fault in faults)
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in KEYS:
            return None  # the order of turns is unknown
        if role == "tool":
            if faults:
                return None  # and so is the call that this answers
            call_id = message["tool_call_id"]
            if call_id not in pending:
                yield f"message {number}: {_unexpected_result(call_id, pending, answered)}"
                return None
            del pending[call_id]
            answered.add(call_id)
            previous = role
            continue
        if pending:
            yield f"message {number}: {_missing_result(pending)}"
            return None
        if role == "system" and number > 1 and previous != "system":
            yield f'message {number}: "system" may only come first; move it to the start of the row'
            return None
        if role == "assistant" and previous in (None, "system"):
            yield f'message {number}: first message must be from "user"; put one before this'
            return None
        if role == previous:
            yield f'message {number}: consecutive "{role}" messages; join them, turns must alternate'
            return None
        previous, pending, answered = role, {}, set()
        if role == "assistant" and message.get("tool_calls") is not None:
            if faults:
                return None
            pending = dict.fromkeys(call.get("id") for call in message["tool_calls"])
    if previous == "tool" and pending:
        yield f"the end: {_missing_result(pending)}"
    return previous


def _unexpected_result(call_id, pending, answered):
    """Return what is wrong with a result of the call `call_id`, which is not pending."""
    shown = printable(call_id)
    if call_id in answered:
        return f'second result of call "{shown}"; keep one'
    if not pending:
        return f'result of call "{shown}" without a call; put it after the message with the call'
    named = [i for i in pending if i is not None][:SHOWN_IDS]
    ids = ", ".join(f'"{printable(i)}"' for i in named) or "none with an id"
    return f'result of unknown call "{shown}"; calls without a result: {ids}'


def _missing_result(pending):
    if None in pending:
        return 'a call before it has no "id" and no result; give it both, or end the row with the call'
    shown = printable(next(iter(pending)))
    return f'call "{shown}" has no result; put a "tool" message before this, or end the row with the call'


def _message_faults(message, names):
    if not isinstance(message, dict):
        yield f'is {_kind(message)}; write {{"role": …, "content": …}}'
        return
    others = [key for key in openai_shape.RENAMED if key in message]
    if others:
        yield from (f'has "{key}" instead of "{openai_shape.RENAMED[key]}"; rename it' for key in others)
        return
    if not {"role", "content"} & set(message):
        yield f'is {_kind(message)} without "role" and "content"; write {{"role": …, "content": …}}'
        return
    role = message.get("role")
    if not isinstance(role, str) or role not in KEYS:
        shown = f'"{printable(role)}"' if isinstance(role, str) else _kind(role)
        usual = OTHER_ROLES.get(role.lower(), role.lower()) if isinstance(role, str) else ""
        roles = f'write "{usual}"' if usual in KEYS else 'use "system", "user", "assistant" or "tool"'
        if usual in ("function_call", "tool_call"):
            roles = 'write "assistant", with the call in "tool_calls"'
        yield f"the role is {shown}; {roles}"
        role = "user"  # to check the rest of it
    for cure, key in openai_shape.meaning_keys(message, openai_shape.MEANING).items():
        yield f'has "{key}": {cure}'
    for key, owner in (("tool_calls", 'an "assistant"'), ("tool_call_id", 'a "tool"')):
        if key in message and key not in KEYS[role]:
            yield f'has "{key}", which belongs to {owner} message; correct the role, or remove it'
    weight = message.get("weight", 1)
    if role == "assistant" and (isinstance(weight, bool) or weight not in (0, 1)):
        yield 'the "weight" is neither 0 (not trained) nor 1 (trained); write one of them'
    if role == "tool" and not isinstance(message.get("tool_call_id"), str):
        kind = _kind(message.get("tool_call_id"))
        yield f'the "tool_call_id" is {kind}; write the "id" of the call that this answers'
    calls = message.get("tool_calls") if role == "assistant" else None
    if calls is not None:
        faults = list(_calls_faults(calls, names))
        yield from faults
        if faults:
            return
    content = message.get("content")
    if isinstance(content, list) and content:
        for part in content:
            if not (isinstance(part, dict) and set(part) == {"type", "text"} and part["type"] == "text"):
                kind = part.get("type") if isinstance(part, dict) else None
                cure = OTHER_PARTS.get(kind) if isinstance(kind, str) else None
                cure = cure or "only text is supported"
                yield f'a part of the content is not {{"type": "text", "text": …}}; {cure}'
                return
            if not isinstance(part["text"], str):
                yield f'the "text" of a part is {_kind(part["text"])}; write a string'
                return
    elif not isinstance(content, str) and not (calls and content in (None, [])):
        yield f'the content is {_kind(content)}; write a string, or a list of {{"type": "text", "text": …}}'
        return
    text = chat_text.message_text(message)
    if not text.strip() and not calls and role != "tool":
        yield "the content is empty; write the text, or remove the message"
    for token in CONTROL_TOKENS:
        if token in text and role != "tool":  # in a result it is escaped
            yield f"the content contains the control token {token}; remove it"
    if any(unicodedata.category(c) == "Cs" for c in text + "".join(map(chat_text.call_tag, calls or []))):
        yield f"the content contains {HALF_PAIR}"


def _calls_faults(calls, names):
    """Yield the faults of a message's tool_calls."""
    if not isinstance(calls, list) or not calls:
        yield f'"tool_calls" is {_kind(calls)}; write a list of {CALL_FORM}, or remove it'
        return
    ids = Counter()
    for number, call in enumerate(calls, 1):
        at = f"call {number}"
        if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
            yield f'{at}: is {_kind(call)} without "function"; write {CALL_FORM}'
            continue
        function = call["function"]
        if call.get("type", "function") != "function":
            yield f'{at}: the type is not "function"; no other is supported'
        if call.get("id") is not None:
            if not isinstance(call["id"], str):
                yield f'{at}: the "id" is {_kind(call["id"])}; write a string'
                continue
            ids[call["id"]] += 1
            if ids[call["id"]] == 2:
                yield f'{at}: duplicate "id" "{printable(call["id"])}"; give each call its own'
        name, arguments = function.get("name"), function.get("arguments")
        if not isinstance(name, str) or not name:
            yield f"{at}: the name is {_kind(name) if name != '' else 'empty'}; write the function's name"
            continue
        if names is not None and name not in names:
            yield f'{at}: calls "{printable(name)}", which "tools" does not declare; add it there'
        if not isinstance(arguments, (str, dict, type(None))):
            yield f'{at}: the arguments are {_kind(arguments)}; write a JSON object, or "{{}}"'
            continue
        try:
            chat_text.call_tag(call)
        except (ValueError, RecursionError) as error:
            reason = json_lines.describe_json_error(error)
            yield f"{at}: malformed arguments ({reason}); write a JSON object, or one in a string"


def _kind(value):
    """Return what kind of JSON value this is, in words."""
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
