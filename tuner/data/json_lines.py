"""Read JSON lines, or one JSON array, with the line of every value and of every mistake."""

import json
from collections import Counter
from pathlib import Path

from tuner.data import file_kinds
from tuner.system.console import printable
from tuner.system.errors import UserError, rows_error


def read_bytes(path, flag="--data"):
    """Return the bytes of a file of rows, which `flag` names; raise UserError if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{printable(str(path), 4096)}: no such file; name it with {flag}") from None
    except IsADirectoryError:
        raise UserError(f"{printable(str(path), 4096)}: {file_kinds.describe_folder(path)}") from None
    except OSError as error:
        raise UserError(
            f"{printable(str(path), 4096)}: cannot be read ({error.strerror}); check the path"
        ) from None


def parse_values(data, path):
    """Yield (line, value, None) or (line, None, what is wrong) for every value in the bytes of a file.

    Raise UserError, which names the file `path`, for a file of another kind; it says what makes rows of it.
    """
    if kind := file_kinds.describe_bytes(data, path):
        raise rows_error(path, [(1, kind)])
    try:
        text = data.decode("utf-8-sig")
        at = data.find(b"\0")  # UTF-16 without a BOM can pass for UTF-8, even with Cyrillic in it
    except UnicodeDecodeError as error:
        at = error.start
    if at >= 0:
        line = data.count(b"\n", 0, at) + 1
        raise rows_error(path, [(line, file_kinds.describe_encoding(data, path))])
    is_array = text.lstrip(" \t\r\n").startswith("[")  # JSON's whitespace
    first = True
    for line, value, fault in _array(text) if is_array else _lines(text):
        if first and (fault or not _is_row(value)):
            describe = file_kinds.describe_text if fault else file_kinds.describe_value
            if kind := describe(text, path):
                raise rows_error(path, [(line, kind)])
        first = False
        yield line, value, fault


def _is_row(value):
    messages = value.get("messages") if isinstance(value, dict) else None
    return isinstance(messages, list) and bool(messages) and isinstance(messages[0], dict)


def _lines(text):
    """Yield what parse_values does, for JSON lines."""
    for line, source in enumerate(text.split("\n"), 1):  # not splitlines: a JSON string may hold U+2028
        if source.strip(" \t\r"):
            try:
                yield line, _parse(source), None
            except (ValueError, RecursionError) as error:
                yield line, None, _json_fault(error)


def _array(text):
    """Yield what parse_values does, for one JSON array; an element's line is the one it begins on."""

    def skip(position):
        while position < len(text) and text[position] in " \t\r\n":
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
                yield line, None, _json_fault(error, "fix it there")
                return
            yield line, value, None
            position = skip(position)
            if text[position : position + 1] != ",":
                break
            position = skip(position + 1)
        if text[position : position + 1] != "]":
            line += text.count("\n", counted, position)
            yield line, None, "not valid JSON (expected , or ] after a row); fix it here"
            return
        position = skip(position + 1)
    if position < len(text):
        yield (
            text.count("\n", 0, position) + 1,
            None,
            "text after the end of the array; a file is one array, or one object per line",
        )


def _unique(pairs):
    """Return a JSON object as a dict. Raise ValueError for a repeated key: its first value would be lost."""
    value = dict(pairs)
    if len(value) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f'duplicate key "{printable(key)}"')
    return value


def _no_constant(name):
    raise ValueError(f"{name} is not a JSON value")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
_parse = _DECODER.decode


def _json_fault(error, cure="fix it: one whole object per line"):
    return f"not valid JSON ({describe_json_error(error)}); {cure}"


def describe_json_error(error):
    """Return why JSON could not be parsed, as one short line."""
    reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    if isinstance(error, json.JSONDecodeError):
        position = f"line {error.lineno}, column" if error.lineno > 1 else "column"
        character = ascii(error.doc[error.pos]) if error.pos < len(error.doc) else "the end"
        reason = f"{error.msg}, {position} {error.colno}, at {character}"
    return printable(reason, 110)
