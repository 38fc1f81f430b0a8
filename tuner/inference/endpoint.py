"""Ask an OpenAI-style endpoint all questions; try results of calls, and streaming."""

import asyncio
import itertools
import json
from contextlib import suppress
from typing import NamedTuple

from tqdm import tqdm

from tuner.data import tool_call
from tuner.inference.endpoint_checks import (
    LoopCheck,
    StreamCheck,
    calling_message,
    check_loop,
    check_streams,
    join_chunks,
)
from tuner.inference.endpoint_client import WRONG_SERVER, RefusedError, connect, send
from tuner.inference.probes import merge_tools
from tuner.system.console import one_line
from tuner.system.errors import UserError

CONCURRENT_REQUESTS = 4
CHARACTERS_PER_TOKEN = 128  # of an answer at most: no usual token is longer, and Gemma's have 31 at most


class Reply(NamedTuple):
    text: str  # calls that came parsed are tags again
    ended: bool  # by itself
    parsed: int  # calls that came as tool_calls
    tagged: int  # calls that came as tags in the text
    message: dict  # as it came


class Replies(NamedTuple):
    model: str
    listed: int  # models that the endpoint lists; 0 if it was not asked
    replies: list  # a Reply for each conversation
    tools_refused: str | None  # what the endpoint says where it takes no tools, and all were asked without
    loop: LoopCheck
    stream: StreamCheck  # of the questions of the first file

    @property
    def parsed(self):
        return sum(reply.parsed for reply in self.replies)

    @property
    def tagged(self):
        return sum(reply.tagged for reply in self.replies)


def ask(url, model, files):
    """Ask a model (None: the first that the endpoint lists) all Questions, greedily; return Replies.

    The tools of all files are declared with each question; where the endpoint takes none, all are asked
    without. Then some calls are given results, and the questions of the first file are asked again, streamed.
    Raise UserError if there is no answer.
    """
    return asyncio.run(_ask(url, model, files))


def sources(files):
    """Return where each question of Questions stands, as `file:line`."""
    return [f"{one_line(str(questions.path))}:{line}" for questions in files for line in questions.lines]


async def _ask(url, model, files):
    async with connect(url) as client:
        listed = 0
        if model is None:
            models = model_names(await send(client, "GET", "models"))
            if not models:
                raise UserError(f"{url} lists no models; name one with --model")
            model, listed = models[0], len(models)
        model = _encodable(model)
        questions = [openai_messages(messages) for part in files for messages in part.conversations]
        limits = [limit for part in files for limit in part.max_new_tokens]
        places, tools = sources(files), merge_tools(*files)
        # With no parser for calls, vLLM refuses questions that declare a tool, and so does llama.cpp without
        # --jinja; the first question, asked alone, finds that out.
        settings = {"model": model, "temperature": 0, **({"tools": tools} if tools else {})}
        tools_refused = None
        semaphore = asyncio.Semaphore(CONCURRENT_REQUESTS)
        bar = tqdm(total=len(questions), desc="answering", unit="row", leave=False, disable=None)

        async def complete(number, messages, stream=False):
            body = {**settings, "max_tokens": limits[number], "messages": messages}
            body |= {"stream": True} if stream else {}
            try:
                response = await send(client, "POST", "chat/completions", body)
                return parse_reply(join_chunks(response) if stream else response, limits[number])
            except UserError as error:
                error.args = (f"{places[number]}: {error}",)
                raise

        async def ask_one(number):
            async with semaphore:
                reply = await complete(number, questions[number])
            bar.update()
            return reply

        with bar:
            try:
                replies = [await ask_one(0)]
            except RefusedError as error:
                if not settings.pop("tools", None):
                    raise
                tools_refused = error.reason
                try:
                    replies = [await ask_one(0)]
                except RefusedError:
                    raise error from None
            replies += await asyncio.gather(*map(ask_one, range(1, len(questions))))
        loop = await check_loop(complete, questions, replies)
        stream = await check_streams(complete, questions[: len(files[0].lines)], replies)
    return Replies(model, listed, replies, tools_refused, loop, stream)


def openai_messages(messages):
    """Return rendered messages in OpenAI's form: an assistant's calls that have results are parsed again.

    Calls without results stay text, as the model wrote them.
    """
    sent = []
    for number, message in enumerate(messages):
        role, text = message["role"], message["content"]
        if role == "tool":
            continue
        sent.append({"role": role, "content": text})
        results = list(itertools.takewhile(lambda m: m["role"] == "tool", messages[number + 1 :]))
        if not results:
            continue
        calls = tool_call.calls_in(text)[-len(results) :]
        sent[-1], parsed = calling_message(text, calls, len(sent))
        for call, result in zip(parsed, results, strict=True):
            sent.append({"role": "tool", "tool_call_id": call["id"], "content": result["content"]})
    return sent


def model_names(data):
    """Return the names in a response of /models, in order; raise UserError if it is malformed."""
    models = data.get("data") if isinstance(data, dict) else None
    names = (
        [m.get("id") if isinstance(m, dict) else None for m in models] if isinstance(models, list) else [None]
    )
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"the endpoint's list of models is malformed; {WRONG_SERVER}")
    return names


def parse_reply(data, limit):
    """Return the Reply of a chat completion; raise UserError if it is malformed.

    Of a text with more characters than `limit` tokens have, which has not ended, the beginning is kept.
    """
    longest = CHARACTERS_PER_TOKEN * limit
    try:
        choice = data["choices"][0]
        message = choice["message"]
        content, calls = message.get("content"), message.get("tool_calls") or []
        content = "" if content is None else content
        functions = [call["function"] for call in calls]
        tags = [tool_call.format_tag(f["name"], _source(f.get("arguments"))) for f in functions]
        tagged = len(tool_call.calls_in(content[:longest]))
        text = "\n".join([content] * (bool(content.strip()) or not tags) + tags)
    except (LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(f"the response is not a chat completion; {WRONG_SERVER}") from None
    ended = choice.get("finish_reason") != "length" and len(text) <= longest
    return Reply(_encodable(text[:longest]), ended, len(tags), tagged, message)


def _source(arguments):
    """Return a parsed call's arguments as text: as they came, or {} where there are none."""
    with suppress(ValueError, RecursionError):
        if tool_call.parse_arguments(arguments) == {}:
            return "{}"
    return arguments if isinstance(arguments, str) else json.dumps(arguments)


def _encodable(text):
    """Replace halves of surrogate pairs, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()
