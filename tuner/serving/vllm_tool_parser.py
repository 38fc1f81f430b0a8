"""A tool parser for vLLM: <tool_call name="…" arguments="…"/> becomes the tool_calls of a chat completion.

    vllm serve gemma-3-4b-it-merged --enable-auto-tool-choice \\
        --tool-parser-plugin tuner/serving/vllm_tool_parser.py --tool-call-parser tool_call_tag

The grammar is tuner/data/tool_call.py's, found from this file's path; a malformed tag stays text.
"""

import sys
from pathlib import Path

from vllm.entrypoints.generate.base.protocol import (
    DeltaFunctionCall,
    DeltaMessage,
    DeltaToolCall,
    ExtractedToolCallInformation,
    FunctionCall,
    ToolCall,
)
from vllm.renderers.chat_utils import make_tool_call_id
from vllm.tool_parsers.abstract_tool_parser import ToolParser, ToolParserManager

sys.path.append(str(Path(__file__).resolve().parents[2]))  # vLLM loads this file by its path
from tuner.data import tool_call
from tuner.data.call_stream import CallStream

NAME = "tool_call_tag"


class TagToolParser(ToolParser):
    # If a call is forced, the model writes the tag too, not the JSON that vLLM would force on it.
    supports_required_and_named = False
    # vLLM 0.33 calls finish_streaming() of such parsers alone; what may begin a tag is held back until then.
    engine_based_streaming = True

    def __init__(self, tokenizer, tools=None):
        super().__init__(tokenizer, tools)
        self.calls = CallStream()

    def extract_tool_calls(self, model_output, request):
        """Return the calls of a whole answer, and the text around them (None if blank)."""
        parts, _ = tool_call.split_text(model_output)
        calls = [part for part in parts if isinstance(part, tool_call.Call)]
        content = "".join(part for part in parts if isinstance(part, str))
        return ExtractedToolCallInformation(
            tools_called=bool(calls),
            tool_calls=[
                ToolCall(
                    function=FunctionCall(name=c.name, arguments=tool_call.format_arguments(c.arguments))
                )
                for c in calls
            ],
            content=(content if content.strip() else None) if calls else model_output,
        )

    def extract_tool_calls_streaming(  # vLLM decides the parameters
        self,
        previous_text,
        current_text,
        delta_text,
        previous_token_ids,
        current_token_ids,
        delta_token_ids,
        request,
    ):
        """Return as a DeltaMessage what a further piece of an answer settles, or None."""
        return self.message(self.calls.add(delta_text))

    def finish_streaming(self):
        """Return what was held back, at the end of the answer, as extract_tool_calls_streaming does."""
        return self.message(self.calls.finish())

    def message(self, parts):
        """Return the DeltaMessage of text and calls, None if there are none; note the calls for vLLM."""
        calls = []
        for part in parts:
            if isinstance(part, tool_call.Call):
                self.current_tool_id += 1
                arguments = tool_call.format_arguments(part.arguments)
                # vLLM looks here for whether there were calls, and for arguments not yet given.
                self.prev_tool_call_arr.append({"name": part.name, "arguments": arguments})
                self.streamed_args_for_tool.append(arguments)
                function = DeltaFunctionCall(name=part.name, arguments=arguments)
                index, call_id = self.current_tool_id, make_tool_call_id()
                calls.append(DeltaToolCall(index=index, id=call_id, type="function", function=function))
        content = "".join(part for part in parts if isinstance(part, str))
        return DeltaMessage(content=content or None, tool_calls=calls) if parts else None


ToolParserManager.register_module(NAME, module=TagToolParser)
