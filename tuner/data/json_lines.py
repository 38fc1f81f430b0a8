"""Read JSON lines, or one JSON array, with the line of every value and of every mistake."""

import json
from collections import Counter
from pathlib import Path

from tuner.system.console import printable
from tuner.system.errors import rows_error


def read_values(path):
    """Yields (line, value, None) or (line, None, what is wrong) for every value of the file."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        cure = "name the file with --data" if isinstance(error, FileNotFoundError) else "check the path"
        raise rows_error(path, [(1, f"cannot be read ({error.strerror}); {cure}")]) from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise rows_error(path, [(line, "is not UTF-8 text; save the file as UTF-8")]) from None
    if "\0" in text:  # UTF-16 without a mark passes for UTF-8, even with Cyrillic in it
        line = text.count("\n", 0, text.index("\0")) + 1
        raise rows_error(path, [(line, "holds a NUL character, as UTF-16 does; save the file as UTF-8")])
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
    """Yields what values does for one JSON array; an element's line is the one it begins on."""
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
    return f"is not valid JSON ({describe_json_error(error)}); {cure}"


def describe_json_error(error):
    reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
    if isinstance(error, json.JSONDecodeError):
        place = f"line {error.lineno}, column" if error.lineno > 1 else "column"
        found = ascii(error.doc[error.pos]) if error.pos < len(error.doc) else "the end"
        reason = f"{error.msg}, {place} {error.colno}, at {found}"
    return printable(reason, 110)
