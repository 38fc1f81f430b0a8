"""The grammar of a call: every form a model writes, every prefix of it, and nothing that is not one."""

import gc
import json
import re
import time
from html.entities import html5
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.data.tool_call import (
    CLOSING_TAG,
    INCOMPLETE,
    NO_OBJECT,
    Call,
    format_call,
    looks_like_call,
    parse,
    parse_at,
    split_text,
)

settings.register_profile("tool_call", deadline=None, derandomize=True, database=None)
settings.load_profile("tool_call")
CANONICAL = '<tool_call name="get_sensitive_data" arguments="{}"/>'
HEAD = '<tool_call name="f" arguments='


def whole(arguments, quote='"'):
    return f"{HEAD}{quote}{arguments}{quote}/>"


@pytest.mark.parametrize(
    ("text", "arguments", "deviations"),
    [
        (whole("{}"), {}, []),
        (whole(" { } "), {}, []),
        (whole("{&quot;id&quot;: 5}"), {"id": 5}, []),
        (whole("{&#0034;a&#x22;:&quot;&lt;/&gt;&amp;lt;&quot;}"), {"a": "</>&lt;"}, []),
        (whole("{&quot;a&quot;: &quot;AT&T &x; \\u0041\\n>/>&quot;}"), {"a": "AT&T &x; A\n>/>"}, []),
        (whole('{"a": [-1.5e+3, true, null]}', "'"), {"a": [-1500.0, True, None]}, ["single quotes"]),
        (whole("{&quot;a&quot;: &quot;it&#39;s&quot;}", "'"), {"a": "it's"}, ["single quotes"]),
        ("<tool_call name='f' arguments=\"{}\"/>", {}, ["single quotes"]),
        (whole('{"id": 5}'), {"id": 5}, ["raw inner quotes"]),
        (whole(' { "a": {"b": "\\"/> &b \\\\"}} '), {"a": {"b": '"/> &b \\'}}, ["raw inner quotes"]),
        ('<tool_call  name="f" arguments="{}"/>', {}, ["spaces"]),
        ('<tool_call name="f"\narguments="{}"/>', {}, ["spaces"]),
        ('< tool_call name="f" arguments="{}"/>', {}, ["spaces"]),
        ('<tool_call name ="f" arguments="{}"/>', {}, ["spaces"]),
        ('<tool_call name="f" arguments=\t"{}"/>', {}, ["spaces"]),
        ('<tool_call name="f" arguments="{}" />', {}, ["spaces"]),
        ('<tool_call name="f" arguments="{}"/ >', {}, ["spaces"]),
        ('<tool_call name="f" arguments="{}">', {}, ["no closing slash"]),
        ('<tool_call name="f" arguments="{}"></tool_call>', {}, ["no closing slash", "closing tag"]),
        ('<tool_call arguments="{}" name="f"/>', {}, ["order of attributes"]),
        (
            '<\n tool_call arguments = "{"a": ">"}"  name=\'f\' ></tool_call>',
            {"a": ">"},
            ["order of attributes", "single quotes", "raw inner quotes", "spaces",
             "no closing slash", "closing tag"],
        ),
    ],
)  # fmt: skip
def test_a_form_is_read_and_each_of_its_prefixes_is_incomplete(text, arguments, deviations):
    assert parse(text) == (Call("f", arguments, tuple(deviations)), None)
    begun = len(text) - len(CLOSING_TAG) if "closing tag" in deviations else len(text)
    for length in range(begun):
        assert parse_at(text[:length]) == (None, 0, INCOMPLETE), text[:length]
    for length in range(begun, len(text)):
        assert parse_at(text[:length]) == (Call("f", arguments, tuple(deviations[:-1])), begun, None)


def test_a_call_is_read_where_it_begins_and_no_further():
    assert parse_at(f"да{CANONICAL}</tool_call>", 2) == (Call("get_sensitive_data", {}, ()), 55, None)
    assert parse_at(f"да{CANONICAL}", 1) == (None, 1, "no call")
    assert parse_at(f"{HEAD}'{{}}'></tool_call>>")[1] == 47


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", INCOMPLETE),
        ("Ваш баланс", "no call"),
        ("<Tool_call name='f' arguments='{}'/>", "no call"),
        ("<tool_calls/>", "no space before an attribute"),
        ('<tool_call name="f"arguments="{}"/>', "no space before an attribute"),
        ("<tool_call/>", "no name"),
        ('<tool_call name="f" />', "no arguments"),
        ('<tool_call name="f" ="{}"/>', "an attribute is missing"),
        ('<tool_call name="f" id="1" arguments="{}"/>', "an unknown attribute"),
        ('<tool_call name="f" argument="{}"/>', "an unknown attribute"),
        ('<tool_call name="f" name="f" arguments="{}"/>', "a repeated attribute"),
        ('<tool_call name="f" arguments="{}" name="f"/>', "no /> after the attributes"),
        ('<tool_call name="f" arguments/>', "an attribute without a value"),
        ("<tool_call name=f arguments={}/>", "an attribute without a value"),
        ('<tool_call name "f" arguments="{}"/>', "an attribute without a value"),
        ('<tool_call name="" arguments="{}"/>', "the name is empty"),
        ('<tool_call name="a&ltb" arguments="{}"/>', "an ambiguous &"),
        (whole("{&quot;a&quot;: &quot;?a=1&region=2&quot;}"), "an ambiguous &"),
        (whole("{&quot;a&quot;: &quot;&notit;&quot;}"), "an ambiguous &"),
        (whole(f"{{&quot;a&quot;: &#{'9' * 5000};}}"), "an ambiguous &"),
        (whole('{"a": "b &amp; c"}'), "character references beside raw quotes"),
        *[(whole(other), NO_OBJECT) for other in ("", "[]", "{} {}", "{'a': 1}", '{"a": &quot;b&quot;}')],
        (whole('{"a": "it\'s"}', "'"), NO_OBJECT),
        (whole("{&quot;a&quot;: &quot;\n&quot;}"), NO_OBJECT),
        (whole('{"a": NaN}'), "a number in the arguments is not finite"),
        (whole('{"a": -Infinity}', "'"), "a number in the arguments is not finite"),
        (whole('{"a": 1e999}'), "a number in the arguments is not finite"),
        (whole('{"a": %s}' % ("9" * 5000)), "a number in the arguments is too long"),
        (whole('{"a": 1, "\\u0061": 2}'), "duplicate key in the arguments"),
        (whole('{"a": {"b": 1, "b": 2}}', "'"), "duplicate key in the arguments"),
        (whole('{"a": ' + "[" * 10**5 + "]" * 10**5 + "}"), "the arguments are nested too deeply"),
        (whole('{"a": ' + "[" * 10**5 + "]" * 10**5 + "}", "'"), "the arguments are nested too deeply"),
        (whole('{"a": 1}x'), "no quote after the arguments"),
        (whole("{}") + "\n", "text around the call"),
        (" " + whole("{}"), "text around the call"),
        (whole("{}") + "</tool_call>", "text around the call"),
        (whole("{}") + whole("{}"), "several calls"),
        ("Вот: " + whole("{}") + " <tool_call", "several calls"),
        ("Вот: " + whole("{}")[:-1], INCOMPLETE),
    ],
)  # fmt: skip
def test_anything_else_is_no_call_and_says_why(text, reason):
    assert parse(text) == (None, reason)


@pytest.mark.parametrize(
    ("text", "fatal"),
    [
        ("", "x"), ("<", "/"), ("< ", "<"), ("<tool", " "), ("<tool_call", "_"), ("<tool_call ", ">"),
        ("<tool_call n", "o"), ("<tool_call name", "s"), ("<tool_call name ", '"'), ("<tool_call name=", "f"),
        (HEAD[:20], "n"), ('<tool_call arguments="{}" ', "a"), ('<tool_call name="a&lt', "="),
        *[(HEAD + begun, fatal) for begun, fatal in [
            ('"{}"', "x"), ('"{}" /', "/"), ('"', "["), ("' ", '"'), ('"{', "x"), ('"{ ', "'"), ('"{""', "}"),
            ('"{"a"', "}"), ('"{"a": 1} ', "}"), ('"{"a": 0', "1"), ('"{"a": -', "I"), ('"{"a": 1e99', "9"),
            ('"{"a": 1e-', "+"), ('"{"a": t', "u"), ('"{"a": ', "N"), ('"{"a": [1', "}"), ('"{"a": [1,', "]"),
            ('"{"a": 1, ', "}"), ('"{"a": 1, "a', '"'), ('"{"b": {"c": 1, "c', '"'), ('"{"a": "\\', "x"),
            ('"{"a": "\\u00', "g"), ('"{"a": "', "\n"), ('"{"\\', "'"), ('"{"a": "&am', "p"), ("'{\"a", "'"),
            ('"{&quot', '"'), ('"{&quot;a', '"'), ('"{&quot;a&quot;&colon', ":"), ('"{&quot;&reg', " "),
            ("'", "}"), ('"{"x": 1,', "}"),
            ("'{\"a\": " + "9" * 400 + ".", "}"), ("'{\"a\": " + "9" * 5000 + "e-", "}"),
        ]],
    ],
)  # fmt: skip
def test_incomplete_ends_with_the_character_that_no_text_can_fix(text, fatal):
    assert parse_at(text)[2] == INCOMPLETE
    assert parse_at(text + fatal)[2] not in (None, INCOMPLETE)


# The last one is too large for a float until its exponent is there.
LITERALS = ["true", "false", "null", "-10.25E-3", '"\\u00e9\\n"', "9" * 400 + ".9e-399"]


@pytest.mark.parametrize("literal", LITERALS)
def test_every_json_literal_may_be_cut_anywhere(literal):
    for text in (whole(f'{{"a": {literal}}}'), whole(f'{{"a": [{literal}, {{"b": {literal}}}]}}', "'")):
        assert parse(text)[0]
        assert {parse_at(text[:length])[2] for length in range(len(text))} == {INCOMPLETE}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CANONICAL, True), ("Секунду <tool_call", True), ("TOOL_CALL", True), ("<tool name='f'>", True),
        ("<Tool-call/>", True), ("", False), ("Инструмент — это tool, call — вызов.", False),
        ("Call a tool: 3 <tools and 5> 2", False), ("if cost <tool price, a = b", False),
        ("<b>да</b>", False),
    ],
)  # fmt: skip
def test_a_plain_sentence_is_no_trace(text, expected):
    assert looks_like_call(text) is expected


def test_what_is_written_is_canonical_to_the_letter():
    assert format_call("get_sensitive_data", {}) == CANONICAL
    text = "{&quot;имя&quot;: &quot;&lt;О'Нил&gt; &amp; \\&quot;Ко\\&quot;&quot;, &quot;n&quot;: [1, 2.5]}"
    assert format_call("f", {"имя": '<О\'Нил> & "Ко"', "n": [1, 2.5]}) == whole(text)
    assert format_call('a"b', {}) == '<tool_call name="a&quot;b" arguments="{}"/>'
    assert format_call("f", ' {"имя":"\\u0436" , "n":[1,2.50]}') == format_call(
        "f", {"имя": "ж", "n": [1, 2.5]}
    )


@pytest.mark.parametrize(
    "arguments",
    [
        *([], {1: 2}, {"a": (1,)}, {"a": float("nan")}, {"a": 1e999}),
        *("[]", "{", '{"a": NaN}', '{"a": 1e999}', '{"a": 1, "a": 1}'),
    ],
)
def test_what_would_not_be_read_back_is_not_written(arguments):
    with pytest.raises(ValueError, match=r"arguments|Expecting"):
        format_call("f", arguments)
    with pytest.raises(ValueError, match="the name is empty"):
        format_call("", {})


ANY_TEXT = st.text(
    st.characters(exclude_categories=()) | st.sampled_from("&<>\"'\\;#")
)  # lone surrogates too
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | ANY_TEXT
)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(ANY_TEXT, inner), max_leaves=6)
PIECES = [
    "<tool_call", 'name="f"', "arguments='{", " ", "=", '"', "'", "{", "}", ":", ",", "[", "]", "1", "e",
    "-", "tru", "&quot;", "&", "&#", "&reg", "\\", "\\u0", "/", ">", "</tool_call>", "\ud800", "я",
]  # fmt: skip
SOUP = st.lists(st.sampled_from(PIECES), max_size=12).map("".join) | ANY_TEXT


@given(name=ANY_TEXT.filter(bool), arguments=st.dictionaries(ANY_TEXT, VALUES), cut=st.integers(0))
def test_a_written_call_is_read_back_and_its_prefixes_are_incomplete(name, arguments, cut):
    text = format_call(name, arguments)
    assert parse(text) == (Call(name, arguments, ()), None)
    assert parse_at(text[: cut % len(text)]) == (None, 0, INCOMPLETE)
    source = json.dumps(arguments).replace("&", "\\u0026")
    raw = whole(source)
    assert parse(raw) == (Call("f", json.loads(source), ("raw inner quotes",) if arguments else ()), None)
    assert parse_at(raw[: cut % len(raw)]) == (None, 0, INCOMPLETE)


@settings(max_examples=300)
@given(begun=st.sampled_from(["", HEAD, HEAD + '"{"a', HEAD + "'{&quot;a&quot;:"]), soup=SOUP)
def test_no_text_raises_and_what_no_text_can_fix_stays_so(begun, soup):
    text = begun + soup
    looks_like_call(text)
    call, reason = parse(text)
    assert (call is None) == bool(reason)
    dead = [parse_at(text[:length])[2] not in (None, INCOMPLETE) for length in range(len(text) + 1)]
    assert dead == sorted(dead)


def said_by_xml(text):
    """Return the (name, arguments) that expat and json read, None if there is no such XML."""
    objects = []
    try:
        tag = ElementTree.fromstring(text)
        json.loads(tag.get("arguments", ""), object_pairs_hook=lambda o: objects.append(o) or dict(o))
        arguments = json.loads(tag.get("arguments"))
    except (ElementTree.ParseError, ValueError):
        return None
    legal = set(tag.keys()) == {"name", "arguments"} and tag.get("name") and isinstance(arguments, dict)
    unique = all(len(dict(pairs)) == len(pairs) for pairs in objects)
    return (tag.get("name"), arguments) if tag.tag == "tool_call" and legal and unique else None


def as_xml(text):
    """Mends what a model may write and XML may not hold: &mp; bare & and <, "< tool_call", "/ >" and ">"."""
    text = re.sub(r"&(?!(?:quot|amp|lt|gt);)(\w+;)", lambda m: html5.get(m[1], m[0]), text)
    text = re.sub(r"&(?!(quot|amp|lt|gt|#\d+);)", "&amp;", text)
    return re.sub(r"/? *>$", "/>", "<" + text[1:].replace("<", "&lt;").lstrip(" "))


DAMAGED = [
    CANONICAL,
    format_call("f&f", {"a": '<b & "c">', "aa": [1, -1.5, {"b": None}]}),
    "<tool_call arguments='{\"a\": 1}' name='f'/>",
]
EDITS = st.tuples(st.integers(0, 200), st.integers(0, 1), st.sampled_from(["", *" <>&;/='\"a{}[]:,1#-\\"]))


@settings(max_examples=1000)
@given(text=st.sampled_from(DAMAGED), edits=st.lists(EDITS, min_size=1, max_size=3))
def test_a_damaged_call_is_read_as_an_xml_parser_reads_it_or_not_at_all(text, edits):
    for at, removed, added in edits:
        at %= len(text) + 1
        text = text[:at] + added + text[at + removed :]
    call, _ = parse(text)
    if call:
        assert call[:2] == said_by_xml(as_xml(text))
    elif text == text.strip():
        assert said_by_xml(text) is None


STARTS = ["", "<tool_call", "<tool_call name='", HEAD + "'", HEAD + '"{"', HEAD + '\'{"a": [']
HOSTILE = [
    CANONICAL, HEAD + "'", "<", "<tool ", "<tool a", " ", "&", "&a", "&lt;", "&#9",
    "1", "\\", '\\"', '"', "{", "[", "[],", '{"a":',
]  # fmt: skip


@pytest.fixture
def no_garbage_collection():
    """Beside tests that import torch it visits so many objects that it takes most of the time."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("start", STARTS)
def test_time_is_linear_in_hostile_text(start, no_garbage_collection):
    for piece in HOSTILE:
        text = start + piece * (100_000 // len(piece))
        for judge in (parse_at, parse, looks_like_call):
            began = time.process_time()
            judge(text)
            assert time.process_time() - began < 1, (judge, piece)


# ---------------------------------------------------------------------------------------------- split

CALL = Call("get_sensitive_data", {}, ())
OPEN = '<tool_call name="f" arguments="{}">'
OPENED, CLOSED = (Call("f", {}, ("no closing slash", *rest)) for rest in ((), ("closing tag",)))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", []),
        ("Это счёт < вклад <b>.", ["Это счёт < вклад <b>."]),
        (CANONICAL, [CALL]),
        (f"Сейчас. {CANONICAL}\n", ["Сейчас. ", CALL, "\n"]),
        (f"{CANONICAL}{CANONICAL} и {CANONICAL}", [CALL, CALL, " и ", CALL]),
        (f"<tool_call name=''/> {CANONICAL}", ["<tool_call name=''/> ", CALL]),
        (f"<{CANONICAL}", ["<", CALL]),
        (CANONICAL[:-1], [CANONICAL[:-1]]),
        (f"<tool_call {CANONICAL}", ["<tool_call ", CALL]),
        (f"{OPEN} да", [OPENED, " да"]),
        (f"{OPEN}</tool_call> да", [CLOSED, " да"]),
        (f"{OPEN}</tool_cal", [OPENED, "</tool_cal"]),
        (f"{OPEN}{CANONICAL}", [OPENED, CALL]),
    ],
)
def test_what_is_said_and_what_is_called(text, parts):
    assert split_text(text) == (parts, "")
    for first in range(len(text) + 1):  # every cut, and character by character
        assert streamed([text[:first], text[first:]]) == parts
    assert streamed(text) == parts


def streamed(pieces):
    """What a reader of a stream has at its end."""
    parts, rest = [], ""
    for piece in pieces:
        found, rest = split_text(rest + piece, more=True)
        parts += found
    found, rest = split_text(rest)
    assert rest == ""
    joined = []
    for part in parts + found:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def test_nothing_is_held_back_that_cannot_be_a_call():
    assert split_text("Сумма 5 < 6 и <b", more=True) == (["Сумма 5 < 6 и <b"], "")
    assert split_text("Сумма <tool", more=True) == (["Сумма "], "<tool")
    assert split_text('<tool_call nome="', more=True) == (['<tool_call nome="'], "")
    assert split_text(f"{CANONICAL}!", more=True) == ([CALL, "!"], "")
    assert split_text(OPEN, more=True) == ([], OPEN)
    assert split_text(f"{OPEN} ", more=True) == ([OPENED, " "], "")


PIECES = [
    CANONICAL,
    OPEN,
    CLOSING_TAG,
    "<",
    "<tool_call",
    ' name="',
    "f",
    '"',
    " arguments='{}'",
    "/>",
    ">",
    "&quot",
    " ",
]


@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), st.lists(st.integers(0, 200), max_size=6))
def test_a_stream_cut_anywhere_says_and_calls_what_the_whole_does(text, cuts):
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    pieces = [text[a:b] for a, b in pairwise(places)]
    assert streamed(pieces) == streamed([text])
