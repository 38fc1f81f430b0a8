"""Chat Messages JSON: what a row may be, and where exactly one is not."""

import hashlib
import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

ROLES = ("system", "user", "assistant")
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


def printable(text, width=60):
    """Returns text as one line of at most `width` characters, control characters replaced."""
    text = "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)
    return text if len(text) <= width else text[: width - 1] + "…"


def text_of(message):
    """Returns a message's text; text parts are put together as Gemma's template does: trimmed, unspaced."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"].strip() for part in content)


def normalised(text):
    """Returns text in lower case, ё as е, punctuation and blanks as single spaces."""
    text = re.sub(r"[^\w\s]", " ", unicodedata.normalize("NFKC", text).lower().replace("ё", "е"))
    return " ".join(text.split())


def fingerprint(messages):
    """Returns the sha256 (hex) of a conversation's normalised turns: of what an answer is asked for."""
    turns = [f"{message['role']}: {normalised(text_of(message))}" for message in messages]
    return hashlib.sha256("\n".join(turns).encode("utf-8", "surrogatepass")).hexdigest()


def read(path):
    """Returns [(line, row), …] of a file: JSON lines or one JSON array, UTF-8 with or without BOM.

    Raises DataError that lists every row in error; a row that is not perfect is never skipped or mended.
    """
    rows, errors = [], []
    for line, value, fault in _values(path):
        faults = [fault] if fault else list(_faults(value))
        errors += [(line, text) for text in faults]
        rows.append((line, value))
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
    reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
    if isinstance(error, json.JSONDecodeError):
        place = f"line {error.lineno}, column" if error.lineno > 1 else "column"
        found = ascii(error.doc[error.pos]) if error.pos < len(error.doc) else "the end"
        reason = f"{error.msg}, {place} {error.colno}, at {found}"
    return f"is not valid JSON ({printable(reason, 110)}); {cure}"


def _faults(row):
    """Yields what is wrong with a row, and what to do about it."""
    if not isinstance(row, dict) or "messages" not in row:
        yield (
            f'the row is {_kind(row)} without "messages"; '
            'write {"messages": [{"role": …, "content": …}, …]}'
        )
        return
    for key in row:
        if key != "messages":
            yield f'unknown key "{printable(key)}" beside "messages"; take it out, nothing would read it'
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        yield f'"messages" is {_kind(messages)}; write a list of at least a "user" and an "assistant" message'
        return
    before = None
    for number, message in enumerate(messages, 1):
        faults = list(_message_faults(message))
        yield from (f"message {number}: {fault}" for fault in faults)
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            return  # the order of turns cannot be told
        if role == "system" and number > 1:
            yield f'message {number}: "system" may only come first; move it to the start of the row'
            return
        if role == "assistant" and before in (None, "system"):
            yield f'message {number}: "assistant" speaks first; put a "user" message before it'
            return
        if role == before:
            yield f'message {number}: "{role}" speaks twice in a row; join the two, turns alternate'
            return
        before = role
    if before != "assistant":
        yield f'the last message is from "{before}"; end the row with an "assistant" turn'


def _message_faults(message):
    if not isinstance(message, dict):
        yield f'is {_kind(message)}; write {{"role": …, "content": …}}'
        return
    if not {"role", "content"} & set(message):
        yield f'is {_kind(message)} without "role" and "content"; write {{"role": …, "content": …}}'
        return
    role = message.get("role")
    if role not in ROLES:
        shown = f'"{printable(role)}"' if isinstance(role, str) else _kind(role)
        yield f'the role is {shown}; use "system", "user" or "assistant"'
    for key in message:
        if key not in ("role", "content"):
            yield f'unknown key "{printable(key)}"; take it out, nothing would read it'
    content = message.get("content")
    if isinstance(content, list) and content:
        for part in content:
            if not (isinstance(part, dict) and set(part) == {"type", "text"} and part["type"] == "text"):
                yield 'a part of the content is not {"type": "text", "text": …}; only text can be trained'
                return
            if not isinstance(part["text"], str):
                yield f'the "text" of a part is {_kind(part["text"])}; write a string'
                return
    elif not isinstance(content, str):
        yield f'the content is {_kind(content)}; write a string, or a list of {{"type": "text", "text": …}}'
        return
    text = text_of(message)
    if not text.strip():
        yield "the content is empty; write the text, or take the row out"
    for token in CONTROL_TOKENS:
        if token in text:
            yield f"the content holds {token}, which the model reads as a control token; take it out"
    if any(unicodedata.category(c) == "Cs" for c in text):
        yield "the content holds half a surrogate pair (\\ud800 to \\udfff); write the character itself"


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
