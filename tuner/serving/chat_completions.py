"""OpenAI's chat completions: what a request may ask; an answer's form, whole and streamed; errors."""

import asyncio
import json
import threading
import time
import uuid
from typing import Annotated, Literal, NamedTuple

from fastapi import HTTPException
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tuner.data import tool_call
from tuner.inference.generation import prompt_ids
from tuner.serving.history import render_history
from tuner.system.console import printable

MAX_COMPLETION_TOKENS = 512  # where the request names no other number
ROUTES = "available: /v1/chat/completions, /v1/models, /health and the page at /"
INTERNAL_ERROR = {"message": "internal server error; see the server's log"}
MAX_STOP = 500  # characters of a stop string, each compared with every piece of an answer
TURN_TOKENS = 4  # that a message takes beside its text: where it begins, whose it is, where it ends
LONGEST_TOKEN = 31  # characters, in Gemma's vocabulary: a run of spaces, tabs or line ends


def to_int(value):
    """Return a float that is a whole number as an int; clients of some languages write 1.0 for 1."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(to_int)]
Positive = Annotated[Whole, Field(ge=1)]
Objects = Annotated[list[dict], Field(fail_fast=True)]  # 250,000 faults of one list take a second to report
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP)]


# ------------------------------------------------------------------------------------------ requests


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class TextFormat(BaseModel):
    type: Literal["text"]


class ChatCompletionRequest(BaseModel):
    """A request. A field's type refuses what cannot be done; fields not named here are ignored."""

    model_config = ConfigDict(strict=True)
    messages: Objects
    model: str | None = None
    tools: Objects | None = None
    tool_choice: Literal["auto", "none"] | None = None  # no call can be forced: the model decides
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None  # 0 if not given: what compare.py judges
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[Whole, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=4, fail_fast=True)] | None = None
    n: Literal[1] | None = None
    response_format: TextFormat | None = None
    logprobs: Literal[False] | None = None
    logit_bias: Annotated[dict, Field(max_length=0)] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None


class Generation(NamedTuple):
    """An answer that is asked for or being written."""

    model: str
    request: ChatCompletionRequest
    prompt_ids: list
    max_new_tokens: int
    output: asyncio.Queue  # the answer's text (str) and calls (Call), at last a Finish or an exception
    disconnected: threading.Event  # the client no longer waits for the answer


class Finish(NamedTuple):
    reason: str  # "stop" or "length"
    tokens: int


def http_error(status, message, code=None, param=None, headers=None):
    """Return the exception that is answered with this status, in OpenAI's form of an error."""
    return HTTPException(status, {"message": message, "code": code, "param": param}, headers)


def error_body(status, detail):
    """Return an error in OpenAI's form; detail is http_error's, or a few words of the framework's."""
    fields = detail if isinstance(detail, dict) else {"message": f"{detail}; {ROUTES}"}
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"type": kind, "code": None, "param": None, **fields}}


def parse_request(body):
    """Return a body as a ChatCompletionRequest; raise an HTTP error that names its first fault."""
    try:
        return ChatCompletionRequest.model_validate_json(body)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        field, reason = ".".join(map(str, fault["loc"])), fault["msg"]
        if field.startswith("stop"):  # of two types, and pydantic reports the first alone
            reason = f"expected a string, or up to 4, none of them empty or longer than {MAX_STOP} characters"
            field = "stop"
        elif field == "tool_choice":
            reason = 'forcing a call is not supported; use "auto" or "none"'
        text = printable(f"{field}: {reason}" if field else reason, 200)
        raise http_error(400, text, param=field.split(".")[0] or None) from None


def make_generation(request, names, tokenizer, context):
    """Return the Generation for a request to one of the models `names`, the first if it names none.

    context: tokens of prompt and answer together; max_tokens beyond it are cut to what fits. Raise an HTTP
    error for a model that is not served, and for messages that are wrong or do not fit; what cannot fit is
    not tokenized.
    """
    if request.model not in (None, *names):
        text = f'model "{printable(request.model)}" not found; available: {", ".join(names)}'
        raise http_error(404, text, "model_not_found", "model")
    messages = request.messages
    if len(messages) > context:
        raise too_long(f"{len(messages)} messages", context)
    try:
        messages = render_history(messages)
    except ValueError as error:
        raise http_error(400, printable(str(error), 200), param="messages") from None
    characters = sum(len(message["content"].strip()) + len(message.get("name", "")) for message in messages)
    least = TURN_TOKENS * len(messages) + characters // LONGEST_TOKEN
    if least > context:
        raise too_long(f"at least {least} prompt tokens", context)
    ids = prompt_ids(tokenizer, messages)
    if len(ids) >= context:
        raise too_long(f"{len(ids)} prompt tokens + 1 for the answer", context)
    asked = request.max_completion_tokens or request.max_tokens or MAX_COMPLETION_TOKENS
    max_new_tokens = min(asked, context - len(ids))
    model = request.model or names[0]
    return Generation(model, request, ids, max_new_tokens, asyncio.Queue(), threading.Event())


def too_long(what, context):
    text = f"{what} exceed the context of {context}"
    return http_error(400, text, "context_length_exceeded", "messages")


# ------------------------------------------------------------------------------------------- answers


async def answer_parts(generation):
    """Yield the answer's text (str) and calls (Call) as they are written, at last the Finish."""
    part = None
    while not isinstance(part, Finish):
        part = await generation.output.get()
        if isinstance(part, BaseException):
            raise part
        yield part


def openai_call(call):
    """Return a tool_call.Call in OpenAI's form."""
    function = {"name": call.name, "arguments": tool_call.format_arguments(call.arguments)}
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}


def response_head(generation, kind):
    """Return the fields that a response begins with; kind: what the object is."""
    identity = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind}
    return {**identity, "created": int(time.time()), "model": generation.model}


def usage(generation, finish):
    counts = {"prompt_tokens": len(generation.prompt_ids), "completion_tokens": finish.tokens}
    return {**counts, "total_tokens": sum(counts.values())}


async def complete_answer(generation):
    """Return the answer in OpenAI's form; a content of blanks beside calls is null, as with vLLM."""
    text, calls = "", []
    async for part in answer_parts(generation):
        if isinstance(part, str):
            text += part
        elif isinstance(part, tool_call.Call):
            calls.append(openai_call(part))
    message = {"role": "assistant", "content": text}
    if calls:
        message |= {"content": text if text.strip() else None, "tool_calls": calls}
    reason = "tool_calls" if calls else part.reason
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
    return {
        **response_head(generation, "chat.completion"),
        "choices": [choice],
        "usage": usage(generation, part),
    }


async def stream_events(generation):
    """Yield the answer as OpenAI streams it, in server-sent events; an error is the last of them."""
    head, calls = response_head(generation, "chat.completion.chunk"), 0
    first = {"role": "assistant", "content": None}
    options = generation.request.stream_options
    counts = options and options.include_usage

    def event(value):
        return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"

    def chunk(delta, reason=None):
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return event({**head, "choices": [choice], **({"usage": None} if counts else {})})

    try:
        async for part in answer_parts(generation):
            if isinstance(part, str):
                yield chunk({**first, "content": part})
            elif isinstance(part, tool_call.Call):
                yield chunk({**first, "tool_calls": [{"index": calls, **openai_call(part)}]})
                calls += 1
            else:
                yield chunk(first and {**first, "content": ""}, "tool_calls" if calls else part.reason)
            first = {}
        if counts:
            yield event({**head, "choices": [], "usage": usage(generation, part)})
        yield "data: [DONE]\n\n"
    except HTTPException as error:
        yield event(error_body(error.status_code, error.detail))
    except Exception:
        yield event(error_body(500, INTERNAL_ERROR))
        raise
