"""The grammar of a tool call as text: parse what a model writes, name its deviations, format it canonically.

Canonical is <tool_call name="get_sensitive_data" arguments="{}"/>, quotes within a value as &quot;.
"""

import html
import json
import math
import re
from contextlib import suppress
from html.entities import html5
from typing import NamedTuple

INCOMPLETE = "the tag is not closed"  # parse_at's reason where more text could complete a call
CLOSING_TAG = "</tool_call>"
ATTRIBUTES = ("name", "arguments")
MAX_DIGITS = 4300  # of an integer: what int() takes since Python 3.10.7, whose time is quadratic

NO_OBJECT = "the arguments are not a JSON object"
BLANK = " \t\r\n"
OPENING = re.compile(rf"<([{BLANK}]*)tool_call")
CUT_OPENING = re.compile(rf"(?:<[{BLANK}]*(\w*))?\Z")
# These two match anywhere, even nothing: empty groups show what is missing.
ATTRIBUTE = re.compile(rf"([{BLANK}]*)([^{BLANK}=\"'<>/]*)([{BLANK}]*)(=?)([{BLANK}]*)([\"']?)")
END = re.compile(rf"([{BLANK}]*)(/?)([{BLANK}]*)(>?)")
RAW = re.compile(rf'[{BLANK}]*({{)[{BLANK}]*"')
REFERENCE = re.compile(r"&(#[0-9]{1,9};|#[xX][0-9a-fA-F]{1,9};|[0-9A-Za-z]{1,31};)")
DIGITS = re.compile(r"&#[0-9]{10}")  # html.unescape gives them to int()
CUT_REFERENCE = re.compile(r"&(#[0-9]{0,9}|#[xX][0-9a-fA-F]{0,9}|[0-9A-Za-z]{0,31})\Z")
RAW_WINDOW = 1024  # letters of raw arguments to look at first: the next call may begin soon
CLOSERS = {"{": "}", "[": "]"}
JSON_MARK = re.compile(r'"[^"\\]*(?:\\.?[^"\\]*)*("?)|[][{}]')
# One of these and the closing brackets complete any truncated JSON; TAILS are for outside a string. The long
# exponents make a number finite that has too many digits for a float.
TAILS = ("", ":0", "rue", "ue", "e", "alse", "lse", "se", "ull", "ll", "l")
TAILS += ("0", "0e-99999999", "-99999999", "99999999", "{}")
ESCAPE_TAILS = ("", "n", "0000")
SURROGATE = re.compile("[\ud800-\udfff]")
TRACE = re.compile(r"tool_call|<tool[\w-]*(\s+\w+\s*=|\s*/?>)", re.IGNORECASE)


class Call(NamedTuple):
    name: str
    arguments: dict
    deviations: tuple[str, ...]  # from the canonical form, a few words each; () if canonical


def parse_at(text, position=0):
    """Parse the call that begins exactly at position: return (call, end, None) or (None, position, reason).

    The reason is INCOMPLETE if, and only if, more text could make it a call; a truncated character reference
    (&quo) counts as any character. A call without the slash ends after its CLOSING_TAG if that follows in
    full, otherwise after its >. Raise nothing.
    """
    try:
        return *_read(text, position), None
    except json.JSONDecodeError:
        return None, position, NO_OBJECT
    except ValueError as error:
        return None, position, str(error)
    except RecursionError:
        return None, position, "the arguments are nested too deeply"


def parse(text):
    """Return (call, None) if the whole text, not stripped, is one call, otherwise (None, reason)."""
    opening = OPENING.search(text)
    start = opening.start() if opening else 0
    call, end, reason = parse_at(text, start)
    if call and OPENING.search(text, end):
        reason = "several calls"
    elif call and (start, end) != (0, len(text)):
        reason = "text around the call"
    return (None, reason) if reason else (call, None)


def calls_in(text):
    """Return the Calls in a text, in order; malformed ones are none."""
    return [part for part in split_text(text)[0] if isinstance(part, Call)]


def split_text(text, more=False):
    """Split a text into ([str or Call, …], rest); malformed tags count as text.

    more: whether text follows. If so, rest is the end of the text that may become a call, or a longer one:
    prepend it to what follows. Otherwise it is empty. Chunks split anywhere give the same as the whole text.
    """
    parts, text_start, start = [], 0, text.find("<")
    while start >= 0:
        call, end, reason = parse_at(text, start)
        unclosed = call and "no closing slash" in call.deviations and "closing tag" not in call.deviations
        if more and (
            reason == INCOMPLETE
            or (unclosed and CLOSING_TAG.startswith(text[end : end + len(CLOSING_TAG) + 1]))
        ):
            break
        if call:
            parts += [text[text_start:start], call]
            text_start = end
        start = text.find("<", end if call else start + 1)
    rest = start if start >= 0 else len(text)
    parts.append(text[text_start:rest])
    return [part for part in parts if part != ""], text[rest:]


def looks_like_call(text):
    """Return whether the text has any trace of a call, well-formed or not."""
    return TRACE.search(text) is not None


def format_call(name, arguments):
    """Return the canonical text of a call; arguments: as parse_arguments takes them.

    Raise ValueError, or what json.dumps raises, if it would not be parsed back to the same.
    """
    arguments = parse_arguments(arguments)
    text = format_tag(name, json.dumps(arguments, ensure_ascii=False))
    call, reason = parse(text)
    if call != (name, arguments, ()):  # json.dumps makes lists of tuples, and strings of other keys
        raise ValueError(reason or NO_OBJECT)
    return text


def parse_arguments(value):
    """Return a call's arguments, a dict, one as JSON text, or for no arguments None or "", as a dict.

    A function without parameters is called with "" or null by vLLM and by many clients.
    Raise ValueError or RecursionError for anything else.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    if isinstance(value, str):
        return _object(value)
    if not isinstance(value, dict):
        raise ValueError(NO_OBJECT)
    return value


def format_arguments(arguments):
    """Return arguments, a dict, as JSON: characters as they are, but escaped if one of them has no UTF-8."""
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    return text if text.isascii() or not SURROGATE.search(text) else json.dumps(arguments)


def format_tag(name, source):
    """Return the tag of a call whose arguments are the text `source`, which need not be JSON."""
    return f'<tool_call name="{_attribute(name)}" arguments="{_attribute(source)}"/>'


def _attribute(value):
    return html.escape(value, quote=False).replace('"', "&quot;")


def name_span(text, position):
    """Return (start, end) of the name attribute of the tag at position: its blanks before, its closing quote.

    Of a malformed call too, if its name can be read; None otherwise. Raise nothing.
    """
    spans = {}
    with suppress(ValueError, RecursionError):
        _read(text, position, spans)
    return spans.get("name")


def _read(text, position, spans=None):
    """Return (call, end). Raise ValueError or RecursionError if there is no call.

    spans: a dict to put the (start, end) of each attribute into, as far as the tag can be read.
    """
    opening = OPENING.match(text, position)
    if not opening:
        start = CUT_OPENING.match(text, position)
        raise ValueError(INCOMPLETE if start and "tool_call".startswith(start[1] or "") else "no call")
    values, quotes, raw, spaces, at = {}, set(), None, opening[1] != "", opening.end()
    while len(values) < len(ATTRIBUTES):
        match = ATTRIBUTE.match(text, at)
        gap, attribute, before, equals, after, quote = match.groups()
        at, following = match.end(), text[match.end(2) : match.end(2) + 1]
        missing = [known for known in ATTRIBUTES if known not in values]
        if not attribute and following:
            raise ValueError(f"no {missing[0]}" if following in "/>" else "an attribute is missing")
        if attribute and not gap:
            raise ValueError("no space before an attribute")
        if attribute not in missing and (following or not any(m.startswith(attribute) for m in missing)):
            raise ValueError("a repeated attribute" if attribute in values else "an unknown attribute")
        if not (equals and quote):
            raise ValueError(INCOMPLETE if at == len(text) and not quote else "an attribute without a value")
        if attribute == "arguments" and quote == '"' and (raw := RAW.match(text, at)):
            values[attribute], at = _raw_value(text, raw.start(1))
        else:
            values[attribute], at = _value(text, at, quote, attribute)
        if spans is not None:
            spans[attribute] = match.start(), at
        quotes.add(quote)
        spaces |= (gap, before, after) != (" ", "", "")
    match = END.match(text, at)
    before, slash, after, bracket = match.groups()
    if not bracket:
        raise ValueError(INCOMPLETE if match.end() == len(text) else "no /> after the attributes")
    closing = not slash and text.startswith(CLOSING_TAG, match.end())
    deviations = {
        "order of attributes": next(iter(values)) != "name",
        "single quotes": "'" in quotes,
        "raw inner quotes": raw,
        "spaces": spaces or before or after,
        "no closing slash": not slash,
        "closing tag": closing,
    }
    call = Call(**values, deviations=tuple(name for name, deviates in deviations.items() if deviates))
    return call, match.end() + len(CLOSING_TAG) * closing


def _value(text, start, quote, attribute):
    """Return (value, index after its closing quote) of the attribute whose value begins at start."""
    end = text.find(quote, start)
    value = _unescape(text[start:end] if end >= 0 else CUT_REFERENCE.sub("", text[start:]))
    if end < 0 and (attribute == "name" or _can_grow(value)):
        raise ValueError(INCOMPLETE)
    if attribute == "arguments":
        value = _object(value)
    elif not value:
        raise ValueError("the name is empty")
    return value, end + 1


def _raw_value(text, start):
    """Do what _value does, for arguments with double quotes within double quotes."""
    size, whole = RAW_WINDOW, False
    while not whole:
        source, whole = text[start : start + size], start + size >= len(text)
        try:
            value, length = DECODER.raw_decode(source)
            break
        except ValueError:
            if not _is_cut(source):
                raise
            if whole:
                if _can_grow(source) and _unescape(source) == source:
                    raise ValueError(INCOMPLETE) from None
                raise
        size *= 4
    if _unescape(source[:length]) != source[:length]:
        raise ValueError("character references beside raw quotes")  # literal or escaped: ambiguous
    end = END.match(text, start + length).end(1)
    if text[end : end + 1] != '"':
        raise ValueError("no quote after the arguments" if end < len(text) else INCOMPLETE)
    return value, end + 1


def _is_cut(source):
    """Return whether JSON that cannot be read is wrong at its end only, where more of it may be right."""
    try:
        LENIENT_DECODER.raw_decode(source)
    except json.JSONDecodeError as error:
        return error.msg.startswith("Unterminated string") or error.pos > len(source) - len("-Infinity")
    return False


def _unescape(text):
    """Return html.unescape(text). Raise ValueError where it would read &region, no semicolon, as ®ion."""
    bare = REFERENCE.sub(lambda m: "<" if m[1][0] == "#" or m[1] in html5 else m[0], text)
    if DIGITS.search(bare) or html.unescape(bare) != bare:
        raise ValueError("an ambiguous &")
    return html.unescape(text)


def _unique(pairs):
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("duplicate key in the arguments")
    return value


def _finite(number):
    value = float(number)  # also 1e999, which JSON allows and Python reads as infinite
    if not math.isfinite(value):
        raise ValueError("a number in the arguments is not finite")
    return value


def _short(digits):
    if len(digits) > MAX_DIGITS:
        raise ValueError("a number in the arguments is too long")
    return int(digits)


DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite, parse_int=_short
)
LENIENT_DECODER = json.JSONDecoder(parse_int=str)  # for which only the grammar can be wrong


def _object(source):
    value = DECODER.decode(source)
    if not isinstance(value, dict):
        raise ValueError(NO_OBJECT)
    return value


def _can_grow(source):
    """Return whether more text could make this a JSON object: whether some tail completes it."""
    closers, in_string = [], False
    for mark in JSON_MARK.finditer(source):
        in_string = mark[1] == ""
        if mark[0] in CLOSERS:
            closers.append(CLOSERS[mark[0]])
        elif mark[0] in "}]" and closers:
            closers.pop()
    new_key = "x" * len(source) + '":0'  # longer than any key in it
    tails = [*TAILS, '"' + new_key]
    if in_string:
        tails = [escape + end for escape in ESCAPE_TAILS for end in ('"', new_key)]
    for tail in tails:
        with suppress(ValueError):
            _object(source + tail + "".join(reversed(closers)))
            return True
    return False
