"""OpenAI's chat completions: what a request may ask; how an answer is told, whole and streamed; errors."""

import asyncio
import json
import threading
import time
import uuid
from typing import Annotated, Literal, NamedTuple

from fastapi import HTTPException
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tuner.data import chat_rows, tool_call
from tuner.inference import generation
from tuner.system.console import printable

NEW_TOKENS = 512  # of an answer, where the request names no other number
ROUTES = "there are /v1/chat/completions, /v1/models, /health and the page at /"
BUG = {"message": "an error of the server, which its log shows"}
Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]


# ------------------------------------------------------------------------------------------ requests


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class TextFormat(BaseModel):
    type: Literal["text"]


class ChatCompletionRequest(BaseModel):
    """A request. What cannot be done is refused by a field's type, and fields not named here are ignored."""

    model_config = ConfigDict(strict=True)
    messages: list[dict]
    model: str | None = None
    tools: list[dict] | None = None
    tool_choice: Literal["auto", "none"] | None = None  # no call can be forced: the model decides
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None  # 0 if not given: what compare.py judges
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None
    n: Literal[1] | None = None
    response_format: TextFormat | None = None
    logprobs: Literal[False] | None = None
    logit_bias: Annotated[dict, Field(max_length=0)] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None


class Generation(NamedTuple):
    model: str
    asked: ChatCompletionRequest
    ids: list  # tokens of the prompt
    new: int  # how many tokens the answer may have
    pieces: asyncio.Queue  # of the answer as it is written: str …, at last an End or an exception
    gone: threading.Event  # nobody waits for the answer any more


class Finish(NamedTuple):
    reason: str  # "stop" or "length"
    tokens: int


def http_error(status, message, code=None, param=None, headers=None):
    """Returns the exception that is answered with this status, in OpenAI's form of an error."""
    return HTTPException(status, {"message": message, "code": code, "param": param}, headers)


def error_body(status, detail):
    """Returns an error in OpenAI's form; detail is a refusal's, or a few words of the framework's."""
    fields = detail if isinstance(detail, dict) else {"message": f"{detail}; {ROUTES}"}
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"type": kind, "code": None, "param": None, **fields}}


def parse_request(body):
    """Returns a request's body as Asked; raises a refusal that names its first fault."""
    try:
        return ChatCompletionRequest.model_validate_json(body)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, fault["loc"]))
        if place.startswith("stop"):  # of two types, and pydantic tells of the first alone
            place, fault["msg"] = "stop", "a string, or up to 4, none of them empty"
        text = printable(f"{place}: {fault['msg']}" if place else fault["msg"], 200)
        raise http_error(400, text, param=place.split(".")[0] or None) from None


def make_generation(asked, names, tokenizer, context):
    """Returns the Job of a request to one of the models `names`, the first if it names none.

    Raises a refusal for a model that is not there, and for messages that are at fault or do not fit.
    """
    if asked.model not in (None, *names):
        text = f"no model {printable(asked.model)} is here, but {' and '.join(names)}"
        raise http_error(404, text, "model_not_found", "model")
    messages = [{**m, "role": "system"} if m.get("role") == "developer" else m for m in asked.messages]
    try:
        messages = chat_rows.validate_and_render(messages)
    except ValueError as error:
        text = " / ".join(printable(line, 200) for line in str(error).split("\n")[:3])
        raise http_error(400, text, param="messages") from None
    if messages[-1]["role"] != "user":
        text = f'the last message is from "{messages[-1]["role"]}"; let "user" or "tool" speak last'
        raise http_error(400, text, param="messages")
    ids = generation.prompt_ids(tokenizer, messages)
    wanted = asked.max_completion_tokens or asked.max_tokens
    new = wanted or max(1, min(NEW_TOKENS, context - len(ids)))
    if len(ids) + new > context:
        text = f"{len(ids)} tokens of messages and {new} to be written are more than the {context} that fit"
        raise http_error(400, text, "context_length_exceeded", "max_tokens" if wanted else "messages")
    return Generation(asked.model or names[0], asked, ids, new, asyncio.Queue(), threading.Event())


# ------------------------------------------------------------------------------------------- answers


def split_at_stop(text, stops):
    """Returns (what may be said of a text, what may begin a stop string, whether it holds a whole one)."""
    places = [text.find(stop) for stop in stops if stop in text]
    if places:
        return text[: min(places)], "", True
    beginnings = [stop[:n] for stop in stops for n in range(1, len(stop))]
    held = max((len(b) for b in beginnings if text.endswith(b)), default=0)
    return text[: len(text) - held], text[len(text) - held :], False


async def answer_parts(job):
    """Yields what the answer says (str) and calls (Call) as soon as it is settled, at last the End."""
    reads_calls, held, piece = bool(job.asked.tools) and job.asked.tool_choice != "none", "", ""
    while not isinstance(piece, Finish):
        piece = await job.pieces.get()
        if isinstance(piece, BaseException):
            raise piece
        new = piece if isinstance(piece, str) else ""
        settled, held = tool_call.split_text(held + new, more=new != "") if reads_calls else ([new], "")
        for part in settled:
            if part != "":
                yield part
    yield piece


def call_of(part):
    """Returns a tool_call.Call in OpenAI's form."""
    function = {"name": part.name, "arguments": json.dumps(part.arguments, ensure_ascii=False)}
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}


def head(job, kind):
    name = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind}
    return {**name, "created": int(time.time()), "model": job.model}


def usage(job, end):
    counts = {"prompt_tokens": len(job.ids), "completion_tokens": end.tokens}
    return {**counts, "total_tokens": sum(counts.values())}


async def complete_answer(job):
    """Returns the answer in OpenAI's form; a content of blanks beside calls is null, as with vLLM."""
    text, calls = "", []
    async for part in answer_parts(job):
        if isinstance(part, str):
            text += part
        elif isinstance(part, tool_call.Call):
            calls.append(call_of(part))
    message = {"role": "assistant", "content": text}
    if calls:
        message |= {"content": text if text.strip() else None, "tool_calls": calls}
    reason = "tool_calls" if calls else part.reason
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
    return {**head(job, "chat.completion"), "choices": [choice], "usage": usage(job, part)}


async def stream_events(job):
    """Yields the answer as OpenAI streams it, in server-sent events; an error is the last of them."""
    start, calls, first = head(job, "chat.completion.chunk"), 0, {"role": "assistant", "content": None}
    counts = job.asked.stream_options and job.asked.stream_options.include_usage

    def event(value):
        return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"

    def chunk(delta, reason=None):
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return event({**start, "choices": [choice], **({"usage": None} if counts else {})})

    try:
        async for part in answer_parts(job):
            if isinstance(part, str):
                yield chunk({**first, "content": part})
            elif isinstance(part, tool_call.Call):
                yield chunk({**first, "tool_calls": [{"index": calls, **call_of(part)}]})
                calls += 1
            else:
                yield chunk(first and {**first, "content": ""}, "tool_calls" if calls else part.reason)
            first = {}
        if counts:
            yield event({**start, "choices": [], "usage": usage(job, part)})
        yield "data: [DONE]\n\n"
    except HTTPException as error:
        yield event(error_body(error.status_code, error.detail))
    except Exception:
        yield event(error_body(500, BUG))
        raise
