"""The plugin through vLLM's own classes, on a CPU: `pytest -m vllm`, set up as CONTRIBUTING.md says."""

import json
from pathlib import Path

import pytest

from tuner.data.tool_call import calls_in, format_call
from tuner.model.response_template import RESPONSE_TEMPLATE

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.vllm
CALL = format_call("get_sensitive_data", {})
ORDER = format_call("get_order", {"номер": 5, "note": 'a "b" <c>'})
TOOLS = [{"type": "function", "function": {"name": "get_sensitive_data", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def parser_class():
    """A parser as vLLM's server makes one, with the plugin that it loaded by its path."""
    pytest.importorskip("vllm")
    from vllm.parser.abstract_parser import DelegatingParser
    from vllm.tool_parsers.abstract_tool_parser import ToolParserManager

    ToolParserManager.import_tool_parser(str(ROOT / "tuner/serving/vllm_tool_parser.py"))

    class Parser(DelegatingParser):
        tool_parser_cls = ToolParserManager.get_tool_parser("tool_call_tag")

    return Parser


def request(**more):
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    messages = [{"role": "user", "content": "Мой баланс?"}]
    return ChatCompletionRequest(**{"model": "m", "messages": messages, "tools": TOOLS, **more})


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Здравствуйте! 5 < 6.", "Здравствуйте! 5 < 6.", []),
        (CALL, None, [("get_sensitive_data", {})]),
        (f"Сейчас. {CALL} Готово", "Сейчас.  Готово", [("get_sensitive_data", {})]),
        (CALL + ORDER, None, [("get_sensitive_data", {}), ("get_order", {"номер": 5, "note": 'a "b" <c>'})]),
        ('<tool_call nome="x"/>', '<tool_call nome="x"/>', []),
        (CALL[:-2], CALL[:-2], []),
        ("<", "<", []),
    ],
)
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_whole_and_streamed_at_every_cut(parser_class, tokenizer, text, content, calls, choice):
    asked = request(tool_choice=choice)
    parser = parser_class(tokenizer, asked.tools)
    assert parser.adjust_request(asked).structured_outputs is None  # no JSON is forced on the model
    _, given, made = parser.parse(text, asked, enable_auto_tools=True)
    assert given == content
    assert [(call.name, json.loads(call.arguments)) for call in made or []] == calls
    cuts = [[text[:place], text[place:]] for place in range(len(text) + 1)]
    for pieces in [*cuts, list(text)]:
        parser = parser_class(tokenizer, asked.tools)
        said, heard = "", {}
        for number, piece in enumerate(pieces):
            ids = tokenizer(piece, add_special_tokens=False)["input_ids"]
            last = number == len(pieces) - 1
            delta = parser.parse_delta(piece, ids, asked, prompt_token_ids=[2], finished=last)
            if delta is None:
                continue
            said += delta.content or ""
            for call in delta.tool_calls:
                if call.id:
                    heard[call.index] = [call.function.name, ""]
                heard[call.index][1] += call.function.arguments or ""
        assert said == (content or "")
        assert [(name, json.loads(text)) for name, text in heard.values()] == calls
        assert list(heard) == list(range(len(calls)))
        assert bool(parser._tool_parser.prev_tool_call_arr) == bool(
            calls
        )  # what the finish reason is taken from


ESCAPED = format_call("get_order", {"note": 'a "b"'})
SIMPLE = format_call("get_order", {"номер": 5, "адрес": "Москва, {5}", "все": [1.5, None]})


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Здравствуйте! 5 < 6.", "Здравствуйте! 5 < 6.", []),
        (f"Сейчас.\n{CALL}\n{SIMPLE}", "Сейчас.", [CALL, SIMPLE]),
        (ESCAPED, ESCAPED, []),  # which the format cannot read stays text, and is not dropped
        (CALL[:-2], CALL[:-2], []),
    ],
)
def test_what_the_parser_hf_reads_at_every_cut(text, content, calls):
    pytest.importorskip("vllm")
    from vllm.parser.chat_parsing.response_parser import ResponseParser
    from vllm.parser.response_template import _streaming_template, validate_response_template_for_serving

    validate_response_template_for_serving(RESPONSE_TEMPLATE)
    for pieces in [*([text[:cut], text[cut:]] for cut in range(len(text) + 1)), list(text)]:
        parser = ResponseParser(
            _streaming_template(RESPONSE_TEMPLATE), prefix="<start_of_turn>model\n", tools=[]
        )
        events = [event for piece in [*pieces, "<end_of_turn>"] for event in parser.feed(piece)]
        events += parser.finalize()[1]
        assert not [event for event in events if event["type"] == "region_malformed"]
        said = [e["text"] for e in events if (e["type"], e["field"]) == ("region_chunk", "content")]
        made = [
            e["value"]["function"]
            for e in events
            if (e["type"], e["field"]) == ("region_close", "tool_calls")
        ]
        assert "".join(said) == content
        assert made == [{"name": c.name, "arguments": c.arguments} for tag in calls for c in calls_in(tag)]
