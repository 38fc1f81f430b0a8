"""Chat Messages JSON: what a row may be, where exactly one is not, and the text that is learned of it."""

import hashlib
import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

import tool_call
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
ERRORS_SHOWN = 20


class DataError(ValueError):
    """Rows in error. `errors` holds (line, text) for all; the message shows the first ERRORS_SHOWN."""

    def __init__(self, path, errors):
        self.errors = errors
        shown = [f"{printable(str(path), 4096)}:{line}: {text}" for line, text in errors[:ERRORS_SHOWN]]
        if len(errors) > ERRORS_SHOWN:
            shown.append(f"… and {len(errors) - ERRORS_SHOWN} more")
        super().__init__("\n".join(shown))


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


def as_text(messages, names=None):
    """Returns [{"role", "content": str}, …]: messages as the model learns and reads them, calls as text.

    An assistant's tool_calls become a tag each (tool_call.write), on lines of their own after its words; the
    results of its calls become one user turn, a tag each (tool_call.write_result), in the order of the calls,
    and what the user says right after them follows in that turn, as it stands: only results are escaped.
    names: of the tools that may be called (names_of), None for any. Keys that no role has are ignored.
    Raises ValueError for messages that are at fault, all faults in it as lines `message 3: what is wrong;
    what to do`; who speaks last is not looked at.
    """
    faults = list(_conversation_faults(messages, names, strict=False))
    if faults:
        raise ValueError("\n".join(faults))
    return _rendered(messages)


def _rendered(messages):
    """Does what as_text does for messages without fault."""
    turns = []
    for place, message in enumerate(messages, 1):
        role, text, calls = message["role"], text_of(message), message.get("tool_calls") or []
        if role == "user" and turns and turns[-1]["role"] == "user":  # which is the results
            turns[-1]["content"] += "\n" + text
        elif role != "tool":
            said = [text] if text.strip() or not calls else []
            turns.append({"role": role, "content": "\n".join(said + [_tag(call) for call in calls])})
        if role == "assistant" and calls and place < len(messages):
            results = {m["tool_call_id"]: text_of(m) for m in messages[place : place + len(calls)]}
            lines = [tool_call.write_result(c["function"]["name"], results[c["id"]]) for c in calls]
            turns.append({"role": "user", "content": "\n".join(lines)})
    return turns


def _tag(call):
    return tool_call.write(call["function"]["name"], call["function"]["arguments"])


def read(path):
    """Returns [(line, row), …] of a file: JSON lines or one JSON array, UTF-8 with or without BOM.

    A row is {"messages": [{"role", "content": str}, …]}, whatever form it has in the file (see as_text).
    Raises DataError that lists every row in error; a row that is not perfect is never skipped or mended.
    """
    rows, errors = [], []
    for line, value, fault in _values(path):
        faults = [fault] if fault else list(_faults(value))
        errors += [(line, text) for text in faults]
        rows.append((line, faults or {"messages": _rendered(value["messages"])}))
    if errors:
        raise DataError(path, errors)
    if not rows:
        raise DataError(path, [(1, "the file has no rows; put one JSON object on each line")])
    return rows


def _values(path):
    """Yields (line, value, None) or (line, None, what is wrong) for every value of the file."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        cure = "name the file with --data" if isinstance(error, FileNotFoundError) else "check the path"
        raise DataError(path, [(1, f"cannot be read ({error.strerror}); {cure}")]) from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(path, [(line, "is not UTF-8 text; save the file as UTF-8")]) from None
    if "\0" in text:  # UTF-16 without a mark passes for UTF-8, even with Cyrillic in it
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(path, [(line, "holds a NUL character, as UTF-16 does; save the file as UTF-8")])
    if text.lstrip(" \t\r\n").startswith("["):  # what JSON calls blank
        yield from _array(text)
        return
    for line, source in enumerate(text.split("\n"), 1):  # not splitlines: a JSON string may hold U+2028
        if source.strip(" \t\r"):
            try:
                yield line, _parse(source), None
            except (ValueError, RecursionError) as error:
                yield line, None, _json_fault(error)


def _array(text):
    """Yields what _values does for one JSON array; an element's line is the one it begins on."""
    blank = " \t\r\n"

    def skip(position):
        while position < len(text) and text[position] in blank:
            position += 1
        return position

    position, line, counted = skip(text.index("[") + 1), 1, 0
    if text[position : position + 1] == "]":
        position = skip(position + 1)
    else:
        while True:
            line, counted = line + text.count("\n", counted, position), position
            try:
                value, position = _DECODER.raw_decode(text, position)
            except (ValueError, RecursionError) as error:
                yield line, None, _json_fault(error, "mend it there")
                return
            yield line, value, None
            position = skip(position)
            if text[position : position + 1] != ",":
                break
            position = skip(position + 1)
        if text[position : position + 1] != "]":
            line += text.count("\n", counted, position)
            yield line, None, "is not valid JSON (a row is followed by neither , nor ]); mend it here"
            return
        position = skip(position + 1)
    if position < len(text):
        yield (
            text.count("\n", 0, position) + 1,
            None,
            "text after the array's end; a file is one array, or an object on each line",
        )


def _unique(pairs):
    """A JSON object as a dict; a repeated key is an error, for the first value would be lost in silence."""
    value = dict(pairs)
    if len(value) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f'the same key twice in one object: "{printable(key)}"')
    return value


def _no_constant(name):
    raise ValueError(f"{name} is no JSON value")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
_parse = _DECODER.decode


def _json_fault(error, cure="mend it, a line is one whole object"):
    return f"is not valid JSON ({_json_reason(error)}); {cure}"


def _json_reason(error):
    reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
    if isinstance(error, json.JSONDecodeError):
        place = f"line {error.lineno}, column" if error.lineno > 1 else "column"
        found = ascii(error.doc[error.pos]) if error.pos < len(error.doc) else "the end"
        reason = f"{error.msg}, {place} {error.colno}, at {found}"
    return printable(reason, 110)


def _faults(row):
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
        names = names_of(row.get("tools"))
    except ValueError as error:
        yield str(error)
        names = None
    last = yield from _conversation_faults(row["messages"], names)
    if last not in (None, "assistant"):
        yield f'the last message is from "{last}"; end the row with an "assistant" turn'


def names_of(tools):
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


def _conversation_faults(messages, names=None, strict=True):
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
    text = text_of(message)
    if not text.strip() and not calls and role != "tool":
        yield "the content is empty; write the text, or leave it out"
    for token in CONTROL_TOKENS:
        if token in text and role != "tool":  # in a result it is escaped
            yield f"the content holds {token}, which the model reads as a control token; take it out"
    if any(unicodedata.category(c) == "Cs" for c in text + "".join(map(_tag, calls or []))):
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
            _tag(call)
        except (ValueError, RecursionError) as error:
            reason = _json_reason(error)
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
