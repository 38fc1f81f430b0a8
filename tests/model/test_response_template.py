"""The response template reads the tag as our own parser does, whole and streamed, or leaves it text."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.utils.chat_parsing.response_parser import ResponseParser, parse_response

from tuner.data import tool_call
from tuner.model import folders
from tuner.model.response_template import RESPONSE_TEMPLATE

PROMPT = '<bos><start_of_turn>user\n<tool_call name="f" arguments="{}"/><end_of_turn>\n<start_of_turn>model\n'
CALL = tool_call.format_call("get_sensitive_data", {})
ORDER = tool_call.format_call(
    "get_order", {"номер": 5, "адрес": "Москва, {5}", "все": [1.5, None, {"а": True}]}
)
# What the format cannot read: the text of a tag that stays.
ESCAPED = [
    tool_call.format_call("f", {"a": value})
    for value in ('a "b"', "R&D", "<b>", "a\nb", "a\tb", "C:\\", "\x01")
]


def whole(text):
    return parse_response(text + "<end_of_turn>", RESPONSE_TEMPLATE, prefix=PROMPT)


def streamed(pieces):
    """Return (message, text, calls) of an answer that comes in pieces, as transformers serve passes it on."""
    parser, events = ResponseParser(RESPONSE_TEMPLATE, prefix=PROMPT), []
    for piece in [*pieces, "<end_of_turn>"]:
        events += parser.feed(piece)
    message, last = parser.finalize()
    events += last
    text = [e["text"] for e in events if e["type"] == "region_chunk" and e["field"] == "content"]
    calls = [e["value"] for e in events if e["type"] == "region_close" and e["field"] == "tool_calls"]
    return message, "".join(text), calls


def functions(calls):
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Здравствуйте! 5 < 6.\n\n a ", "Здравствуйте! 5 < 6.\n\n a ", []),
        (CALL, "", [CALL]),
        (f"Сейчас.\n{CALL}", "Сейчас.", [CALL]),
        (f"{CALL}\n{ORDER}", "", [CALL, ORDER]),
        (ORDER + CALL, "", [ORDER, CALL]),
        *((tag, tag, []) for tag in ESCAPED),
        (f"{ESCAPED[0]}\n{CALL}", ESCAPED[0], [CALL]),
        (CALL[:-2], CALL[:-2], []),
        (CALL[:15], CALL[:15], []),
        ('<tool_call name="f" arguments="{&quot;a&quot;: }"/>',) * 2 + ([],),
        ('<tool_call name="f" arguments="[]"/>',) * 2 + ([],),
        ('<tool_call nome="f"/>', '<tool_call nome="f"/>', []),
        ("<", "<", []),
    ],
)
def test_whole_and_streamed_at_every_cut(text, content, calls):
    due = [(call.name, call.arguments) for tag in calls for call in tool_call.calls_in(tag)]
    message = whole(text)
    assert functions(message.pop("tool_calls", [])) == due
    assert message == {"role": "assistant", **({"content": content} if content else {})}
    for pieces in [*([text[:cut], text[cut:]] for cut in range(len(text) + 1)), list(text)]:
        message, heard, made = streamed(pieces)
        assert (heard, functions(made)) == (content, due)
        assert functions(message.get("tool_calls", [])) == due


def test_of_text_around_calls_a_stream_has_all_and_the_whole_the_last():
    """So the format is: said here so that a change of it is noticed."""
    text = f"Раз. {CALL} Два."
    assert whole(text)["content"] == " Два."
    assert streamed(text)[1] == "Раз. Два."


PLAIN = st.text(st.characters(exclude_characters='"\\&<>\x7f', exclude_categories=["Cs", "Cc"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PLAIN, inner, max_size=3),
)


@settings(deadline=None, derandomize=True, database=None, max_examples=200)
@given(arguments=st.dictionaries(PLAIN, VALUES, max_size=3))
def test_all_arguments_without_escapes_are_read(arguments):
    text = tool_call.format_call("f", arguments)
    for message in (whole(text), streamed(text)[0]):
        assert functions(message["tool_calls"]) == [("f", arguments)]


@settings(deadline=None, derandomize=True, database=None, max_examples=200)
@given(soup=st.lists(st.sampled_from(["&quot;", "&amp;", "\\", "{", "}", ":", ",", "a", "1", " ", '"/>'])))
def test_nothing_is_read_that_our_own_parser_would_read_otherwise(soup):
    text = f'<tool_call name="f" arguments="{{{"".join(soup)}}}"/>'
    try:
        read = functions(whole(text).get("tool_calls", []))
    except ValueError as error:
        pytest.fail(f"{text}: {error}")
    ours = [(call.name, call.arguments) for call in tool_call.calls_in(text)]
    assert read in ([], ours)


def test_adapter_and_merged_folder_carry_it(tokenizer, tmp_path):
    base, folder = tmp_path / "base", tmp_path / "copy"
    folder.mkdir()
    tokenizer.save_pretrained(base)
    folders.copy_tokenizer(base, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["response_template"] == RESPONSE_TEMPLATE
    loaded = AutoTokenizer.from_pretrained(folder)
    assert functions(loaded.parse_response(f"{ORDER}<end_of_turn>", prefix=PROMPT)["tool_calls"]) == [
        tool_call.calls_in(ORDER)[0][:2]
    ]
    (base / "tokenizer_config.json").unlink()
    folders.copy_tokenizer(base, folder)
    assert "response_template" in json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
