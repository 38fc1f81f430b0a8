"""The grammar of a tool call as text: reads what a model writes, says where it deviates, writes it right.

Canonical is <tool_call name="get_sensitive_data" arguments="{}"/>, quotes within a value written as &quot;.
"""

import html
import json
import math
import re
from contextlib import suppress
from html.entities import html5
from typing import NamedTuple

INCOMPLETE = "the tag is not closed"  # read's reason where more text could still make a call
CLOSING_TAG = "</tool_call>"
ATTRIBUTES = ("name", "arguments")
MAX_DIGITS = 4300  # of an integer: what int() takes since Python 3.10.7, whose time is quadratic

NO_OBJECT = "the arguments are not a JSON object"
BLANK = " \t\r\n"
OPENING = re.compile(rf"<([{BLANK}]*)tool_call")
# These two match anywhere, if need be nothing: the empty groups tell what is lacking.
ATTRIBUTE = re.compile(rf"([{BLANK}]*)([^{BLANK}=\"'<>/]*)([{BLANK}]*)(=?)([{BLANK}]*)([\"']?)")
END = re.compile(rf"([{BLANK}]*)(/?)([{BLANK}]*)(>?)")
RAW = re.compile(rf'[{BLANK}]*({{)[{BLANK}]*"')
REFERENCE = re.compile(r"&(#[0-9]{1,9};|#[xX][0-9a-fA-F]{1,9};|[0-9A-Za-z]{1,31};)")
DIGITS = re.compile(r"&#[0-9]{10}")  # html.unescape gives them to int()
CUT_REFERENCE = re.compile(r"&(#[0-9]{0,9}|#[xX][0-9a-fA-F]{0,9}|[0-9A-Za-z]{0,31})\Z")
CLOSERS = {"{": "}", "[": "]"}
JSON_MARK = re.compile(r'"[^"\\]*(?:\\.?[^"\\]*)*("?)|[][{}]')
# Whatever JSON is cut short, one of these and the closing brackets make it whole: TAILS outside a string. The
# long exponents bring back a number that has too many digits for a float.
TAILS = ("", ":0", "rue", "ue", "e", "alse", "lse", "se", "ull", "ll", "l")
TAILS += ("0", "0e-99999999", "-99999999", "99999999", "{}")
ESCAPE_TAILS = ("", "n", "0000")
TRACE = re.compile(r"tool_call|<tool[\w-]*(\s+\w+\s*=|\s*/?>)", re.IGNORECASE)


class Call(NamedTuple):
    name: str
    arguments: dict
    deviations: tuple[str, ...]  # from the canonical form, in a few words each; () is canonical


def parse_at(text, position=0):
    """Reads the call that begins exactly at position: (call, end, None), or (None, position, reason).

    The reason is INCOMPLETE if more text could make it a call, and never if none could; a character reference
    cut short (&quo) counts as any character. A call without the slash ends after its CLOSING_TAG if that is
    all there, otherwise after its >. Raises nothing.
    """
    try:
        return *_read(text, position), None
    except json.JSONDecodeError:
        return None, position, NO_OBJECT
    except ValueError as error:
        return None, position, str(error)
    except RecursionError:
        return None, position, "the arguments are nested too deep"


def parse(text):
    """Returns (call, None) if the whole text, stripped of nothing, is one call, otherwise (None, reason)."""
    opening = OPENING.search(text)
    start = opening.start() if opening else 0
    call, end, reason = parse_at(text, start)
    if call and OPENING.search(text, end):
        reason = "several calls"
    elif call and (start, end) != (0, len(text)):
        reason = "text around the call"
    return (None, reason) if reason else (call, None)


def split_text(text, more=False):
    """Cuts a text into ([what is said (str) or called (Call), …], rest); malformed tags are said.

    With `more` to come, rest is the end of the text that it could make a call of, or a longer one: put it
    before what comes. Without, it is empty. So pieces cut anywhere say and call the same as the whole.
    """
    parts, said, start = [], 0, text.find("<")
    while start >= 0:
        call, end, reason = parse_at(text, start)
        unclosed = call and "no closing slash" in call.deviations and "closing tag" not in call.deviations
        if more and (reason == INCOMPLETE or (unclosed and CLOSING_TAG.startswith(text[end:]))):
            break
        if call:
            parts += [text[said:start], call]
            said = end
        start = text.find("<", end if call else start + 1)
    rest = start if start >= 0 else len(text)
    parts.append(text[said:rest])
    return [part for part in parts if part != ""], text[rest:]


def looks_like_call(text):
    """Whether the text holds any trace of a call, well-formed or not."""
    return TRACE.search(text) is not None


def format_call(name, arguments):
    """Returns the canonical text; arguments are a dict, or one written as JSON.

    Raises ValueError, or as json.dumps, if it would not be read back.
    """
    if isinstance(arguments, str):
        arguments = _object(arguments)
    text = format_tag(name, json.dumps(arguments, ensure_ascii=False))
    call, reason = parse(text)
    if call != (name, arguments, ()):  # json.dumps makes lists of tuples, and strings of other keys
        raise ValueError(reason or NO_OBJECT)
    return text


def format_tag(name, source):
    """Returns the tag of a call whose arguments are this text, JSON or not: read tells."""
    return f'<tool_call name="{_attribute(name)}" arguments="{_attribute(source)}"/>'


def format_result(name, content):
    """Returns <tool_result name="…">…</tool_result>: what a call gave, as the user's side tells the model.

    &, < and > of the content are written as &amp;, &lt; and &gt;: it can end or begin no tag and
    hold no control token. html.unescape gives it back.
    """
    return f'<tool_result name="{_attribute(name)}">{html.escape(content, quote=False)}</tool_result>'


def _attribute(value):
    return html.escape(value, quote=False).replace('"', "&quot;")


def _read(text, position):
    """Returns (call, end); ValueError or RecursionError if there is none."""
    opening = OPENING.match(text, position)
    if not opening:
        start = text[position : position + 1] + text[position + 1 :].lstrip(BLANK)
        raise ValueError(INCOMPLETE if "<tool_call".startswith(start) else "no call")
    values, quotes, raw, spaces, at = {}, set(), None, opening[1] != "", opening.end()
    while len(values) < len(ATTRIBUTES):
        match = ATTRIBUTE.match(text, at)
        gap, attribute, before, equals, after, quote = match.groups()
        at, following = match.end(), text[match.end(2) : match.end(2) + 1]
        missing = [known for known in ATTRIBUTES if known not in values]
        if not attribute and following:
            raise ValueError(f"no {missing[0]}" if following in "/>" else "no attribute where one belongs")
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
    call = Call(**values, deviations=tuple(words for words, found in deviations.items() if found))
    return call, match.end() + len(CLOSING_TAG) * closing


def _value(text, start, quote, attribute):
    """Returns (value, index after its closing quote) of the attribute whose value begins at start."""
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
    """Does what _value does, for arguments with double quotes within double quotes."""
    try:
        value, end = DECODER.raw_decode(text, start)
    except ValueError:
        if _can_grow(text[start:]) and _unescape(text[start:]) == text[start:]:
            raise ValueError(INCOMPLETE) from None
        raise
    if _unescape(text[start:end]) != text[start:end]:
        raise ValueError("&…; beside raw quotes")  # meant as it stands or escaped: no one can tell
    end = END.match(text, end).end(1)
    if text[end : end + 1] != '"':
        raise ValueError("no quote after the arguments" if text[end:] else INCOMPLETE)
    return value, end + 1


def _unescape(text):
    """Returns html.unescape(text); ValueError where it would read &region, without a semicolon, as ®ion."""
    bare = REFERENCE.sub(lambda m: "<" if m[1][0] == "#" or m[1] in html5 else m[0], text)
    if DIGITS.search(bare) or html.unescape(bare) != bare:
        raise ValueError("an & that can be read in two ways")
    return html.unescape(text)


def _unique(pairs):
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("the same key twice in the arguments")
    return value


def _finite(number):
    value = float(number)  # of a number like 1e999 too, which JSON allows and Python reads as infinite
    if not math.isfinite(value):
        raise ValueError("a number in the arguments that is not finite")
    return value


def _short(digits):
    if len(digits) > MAX_DIGITS:
        raise ValueError("a number in the arguments that is too long")
    return int(digits)


DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite, parse_int=_short
)


def _object(source):
    value = DECODER.decode(source)
    if not isinstance(value, dict):
        raise ValueError(NO_OBJECT)
    return value


def _can_grow(source):
    """Whether more text could make this text a JSON object: whether it is one with some tail put to it."""
    closers, in_string = [], False
    for mark in JSON_MARK.finditer(source):
        in_string = mark[1] == ""
        if mark[0] in CLOSERS:
            closers.append(CLOSERS[mark[0]])
        elif mark[0] in "}]" and closers:
            closers.pop()
    new_key = "x" * len(source) + '":0'  # longer than any key that stands there
    tails = [*TAILS, '"' + new_key]
    if in_string:
        tails = [escape + end for escape in ESCAPE_TAILS for end in ('"', new_key)]
    for tail in tails:
        with suppress(ValueError):
            _object(source + tail + "".join(reversed(closers)))
            return True
    return False
