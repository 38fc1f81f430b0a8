"""Read JSON lines, or one JSON array, with the line of every value and of every mistake."""

import json
from collections import Counter
from pathlib import Path

from tuner.system.console import printable
from tuner.system.errors import UserError, rows_error


def read_bytes(path):
    """Return the bytes of a file of rows; raise UserError if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{printable(str(path), 4096)}: no such file; name it with --data") from None
    except OSError as error:
        raise UserError(
            f"{printable(str(path), 4096)}: cannot be read ({error.strerror}); check the path"
        ) from None


def parse_values(data, path):
    """Yield (line, value, None) or (line, None, what is wrong) for every value in the bytes of a file.

    Raise UserError, which names the file `path`, for bytes that are not UTF-8.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise rows_error(path, [(line, "not UTF-8 text; save the file as UTF-8")]) from None
    if "\0" in text:  # UTF-16 without a BOM can pass for UTF-8, even with Cyrillic in it
        line = text.count("\n", 0, text.index("\0")) + 1
        raise rows_error(path, [(line, "contains a NUL character, as UTF-16 does; save the file as UTF-8")])
    if text.lstrip(" \t\r\n").startswith("["):  # JSON's whitespace
        yield from _array(text)
        return
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
