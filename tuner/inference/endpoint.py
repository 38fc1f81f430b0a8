"""Ask an OpenAI-style endpoint for answers; where none comes, say in one line why."""

import asyncio
import itertools
import json
import os
import re
import time
from contextlib import suppress
from typing import NamedTuple
from urllib.parse import urlsplit

import httpx2  # what huggingface_hub talks through
from tqdm import tqdm

from tuner.data import tool_call
from tuner.inference.probes import merge_tools
from tuner.system.console import one_line, printable
from tuner.system.errors import UserError

CONCURRENT_REQUESTS = 4
TIMEOUT = 300  # seconds for a whole answer; a CPU that answers four at once takes one or two minutes
MAX_BYTES = 4 * 2**20  # of a response, decompressed; the longest lists of models have some 500 KB
CHARACTERS_PER_TOKEN = 128  # of an answer at most: no usual token is longer, and Gemma's have 31 at most
CONNECT_TIMEOUT = 10  # seconds
BUSY_TIMEOUT = 60  # seconds that an endpoint may stay busy (429, 503), all waits together
KEY = "OPENAI_API_KEY"
WRONG_SERVER = "check that --endpoint is an OpenAI-style server, path included: …/v1"


class Reply(NamedTuple):
    text: str  # calls that came parsed are tags again
    ended: bool  # by itself
    parsed: int  # calls that came as tool_calls
    tagged: int  # calls that came as tags in the text


class Replies(NamedTuple):
    model: str
    listed: int  # models that the endpoint lists; 0 if it was not asked
    replies: list  # a Reply for each conversation
    tools_refused: str | None  # what the endpoint says where it takes no tools, and all were asked without


class RefusedError(UserError):
    """The endpoint understood, and would not; `reason` is what it says."""

    def __init__(self, text, reason):
        super().__init__(text)
        self.reason = reason


def check_address(text):
    """Return an http(s) address as requests need it; ValueError for another, or one with a password."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise ValueError
    if parts.username is not None or parts.query or parts.fragment or not text.isprintable():
        raise ValueError
    try:
        httpx2.URL(text)
    except httpx2.InvalidURL as error:
        raise ValueError from error
    return text.rstrip("/")


def ask(url, model, files):
    """Ask a model (None: the first that the endpoint lists) all Questions, greedily; return Replies.

    The tools of all files are declared with each question; where the endpoint takes none, all are asked
    without. Raise UserError if there is no answer.
    """
    return asyncio.run(_ask(url, model, files))


def sources(files):
    """Return where each question of Questions stands, as `file:line`."""
    return [f"{one_line(str(questions.path))}:{line}" for questions in files for line in questions.lines]


async def _ask(url, model, files):
    async with _client(url) as client:
        listed = 0
        if model is None:
            models = model_names(await _send(client, "GET", "models"))
            if not models:
                raise UserError(f"{url} lists no models; name one with --model")
            model, listed = models[0], len(models)
        model = _encodable(model)
        conversations = [messages for questions in files for messages in questions.conversations]
        limits = [limit for questions in files for limit in questions.max_new_tokens]
        places, tools = sources(files), merge_tools(*files)
        settings = {"model": model, "temperature": 0}
        # With no parser for calls, vLLM refuses questions that declare a tool, and so does llama.cpp without
        # --jinja; the first question, asked alone, finds that out.
        declared = {"tools": tools} if tools else {}
        tools_refused = None
        semaphore = asyncio.Semaphore(CONCURRENT_REQUESTS)
        bar = tqdm(total=len(conversations), desc="answering", unit="row", leave=False, disable=None)

        async def ask_one(number):
            body = {**settings, **declared, "max_tokens": limits[number]}
            body["messages"] = openai_messages(conversations[number])
            async with semaphore:
                try:
                    response = await _send(client, "POST", "chat/completions", body)
                    reply = parse_reply(response, limits[number])
                except UserError as error:
                    error.args = (f"{places[number]}: {error}",)
                    raise
            bar.update()
            return reply

        with bar:
            try:
                replies = [await ask_one(0)]
            except RefusedError as error:
                if not declared:
                    raise
                declared, tools_refused = {}, error.reason
                try:
                    replies = [await ask_one(0)]
                except RefusedError:
                    raise error from None
            replies += await asyncio.gather(*map(ask_one, range(1, len(conversations))))
    return Replies(model, listed, replies, tools_refused)


def _client(url):
    """Return the HTTP client for an endpoint, with the key from the environment."""
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{KEY} contains characters that no API key has; set it again")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = httpx2.Timeout(None, connect=CONNECT_TIMEOUT)
    direct = dict.fromkeys(("all://127.0.0.1", "all://localhost", "all://[::1]"))  # whatever HTTP_PROXY says
    return httpx2.AsyncClient(base_url=url, headers=headers, timeout=timeout, mounts=direct)


async def _send(client, method, path, body=None):
    """Return a response's JSON; retry a busy endpoint for BUSY_TIMEOUT. Raise UserError or RefusedError."""
    url = str(client.base_url).rstrip("/")
    started, pause = time.monotonic(), 1
    while True:
        try:
            response, content = await asyncio.wait_for(_receive(client, method, path, body), TIMEOUT)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            reason = printable(str(error), 100) or f"no connection within {CONNECT_TIMEOUT} s"
            cure = "start the server, or correct the address"
            raise UserError(f"cannot connect to {url} ({reason}); {cure}") from None
        except asyncio.TimeoutError:
            raise UserError(f"{url} did not answer within {TIMEOUT} s; see its log") from None
        except httpx2.HTTPError as error:
            reason = printable(str(error), 100) or type(error).__name__
            raise UserError(f"{url} broke the connection ({reason}); see its log, then try again") from None
        if response.status_code not in (429, 503):
            break
        after = response.headers.get("Retry-After", "")
        wait = max(1, int(after)) if re.fullmatch("[0-9]{1,6}", after) else pause
        if time.monotonic() - started + wait > BUSY_TIMEOUT:
            reason = _reason(response, content, client)
            raise UserError(f"{url} is still busy ({response.status_code}: {reason}); try again later")
        await asyncio.sleep(wait)
        pause = min(2 * pause, 8)
    if response.is_success:
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            kind = printable(response.headers.get("Content-Type", "no content type"))
            raise UserError(f"{url} does not answer in JSON ({kind}); {WRONG_SERVER}") from None
    raise _failure(url, response, _reason(response, content, client), path)


async def _receive(client, method, path, body):
    """Return (response, its body as bytes); raise UserError where that has more than MAX_BYTES."""
    raw, content = bytearray(), bytearray()

    def add(chunk, to):
        to += chunk
        if len(to) > MAX_BYTES:
            url, most = str(client.base_url).rstrip("/"), f"{MAX_BYTES / 2**20:g} MiB"
            raise UserError(f"{url} answers /{path} with more than {most}; {WRONG_SERVER}")

    async with client.stream(method, path, json=body) as response:
        async for chunk in response.aiter_raw():
            add(chunk, raw)
    # Decompressed by 1 MiB at a time, so no bomb goes off. While it comes, what follows a compressed body
    # would be kept without being counted.
    received = httpx2.Response(response.status_code, headers=response.headers, stream=httpx2.ByteStream(raw))
    for chunk in received.iter_bytes():
        add(chunk, content)
    return response, bytes(content)


def _failure(url, response, reason, path):
    """Return the error for a response without success, with the cure."""
    status = response.status_code
    if status in (401, 403):
        if "Authorization" in response.request.headers:
            return UserError(f"{url} rejects the API key in {KEY} ({status}); set the right one")
        return UserError(f"{url} requires an API key ({status}); set {KEY}")
    if response.is_redirect:
        return UserError(f"{url} redirects ({status}); use the address it redirects to")
    reason_text = f"{status}: {reason}"
    or_model = ", or name its model with --model" if path == "models" else ""  # not every server lists them
    if status == 404 and path != "models" and "model" in reason.lower():
        return UserError(f"{url} rejects the request ({reason_text}); name a model that it has with --model")
    if status in (404, 405):
        cure = "end the address in /v1" + (or_model or ", and name a model that it has")
        return UserError(f"{url} has no /{path} ({reason_text}); {cure}")
    if re.search("context|too long|max_model_len", reason, re.IGNORECASE):
        cure = "serve with a longer context (vLLM: --max-model-len, llama.cpp: --ctx-size)"
    else:
        cure = ("see its log" if status >= 500 else "change how it is served") + or_model
    return RefusedError(f"{url} rejects the request ({reason_text}); {cure}", reason_text)


def _reason(response, content, client):
    """Return what the body of an error says, in one line; never the key, which a server may repeat."""
    try:
        message = json.loads(content)
        # OpenAI's {"error": {"message": …}}, FastAPI's {"detail": …}
        for name in ("error", "message", "detail"):
            message = message.get(name, message) if isinstance(message, dict) else message
        text = message if isinstance(message, str) else json.dumps(message, ensure_ascii=False)
    except (ValueError, RecursionError):
        plain = response.headers.get("Content-Type", "").startswith("text/plain")
        text = content.decode(errors="replace") if plain else ""
    if key := client.headers.get("Authorization", "").removeprefix("Bearer "):
        text = text.replace(key, "…")
    return printable(text.strip() or response.reason_phrase or "no reason given", 200)


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
        tags = "\n".join(tool_call.format_call(call.name, call.arguments) for call in calls)
        words = text.removesuffix(tags).removesuffix("\n")
        ids = [f"call{len(sent):03}{i:02}" for i in range(len(calls))]  # nine characters, as Mistral's wants
        functions = [{"name": call.name, "arguments": json.dumps(call.arguments)} for call in calls]
        parsed = [{"id": i, "type": "function", "function": f} for i, f in zip(ids, functions, strict=True)]
        sent[-1] |= {"content": words or None, "tool_calls": parsed}
        for i, result in zip(ids, results, strict=True):
            sent.append({"role": "tool", "tool_call_id": i, "content": result["content"]})
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
    return Reply(_encodable(text[:longest]), ended, len(tags), tagged)


def _source(arguments):
    """Return a parsed call's arguments as text: as they came, or {} where there are none."""
    with suppress(ValueError, RecursionError):
        if tool_call.parse_arguments(arguments) == {}:
            return "{}"
    return arguments if isinstance(arguments, str) else json.dumps(arguments)


def _encodable(text):
    """Replace halves of surrogate pairs, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()
