"""An OpenAI-style endpoint, asked for answers: what comes back, and in one line why nothing does."""

import asyncio
import json
import os
import re
import time
from typing import NamedTuple
from urllib.parse import urlsplit

from tuner.data import tool_call
from tuner.system.console import printable
from tuner.system.errors import UserError

AT_ONCE = 4  # requests
TIMEOUT = 300  # seconds for an answer; a CPU that answers four at once takes one or two minutes
REACHED_WITHIN = 10  # seconds for a connection
PATIENCE = 60  # seconds that an endpoint may stay busy (429, 503), all waits together
KEY = "OPENAI_API_KEY"
OTHER_ADDRESS = "name an OpenAI-style server, with its path: …/v1"


class Reply(NamedTuple):
    text: str  # calls that came parsed are tags again
    ended: bool  # by itself
    parsed: int  # calls that came as tool_calls
    tagged: int  # calls that came as tags in the text


class Refused(UserError):
    """The endpoint understood, and would not; `reason` is what it says."""

    def __init__(self, text, reason):
        super().__init__(text)
        self.reason = reason


def check_address(text):
    """Returns an http(s) address as it is asked; raises ValueError for another, or one with a password."""
    import httpx2  # what huggingface_hub talks through

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


def ask(url, model, conversations, places, tools, max_tokens):
    """Asks a model (None: the first that the endpoint lists) conversations, greedily, AT_ONCE at a time.

    Returns (model, how many it lists, 0 if it was not asked, replies in order, refusal). The functions that
    `tools` names are declared with each question; where the endpoint takes none, refusal is what it says, and
    all are asked without. places say where a conversation stands. Raises UserError if there is no answer.
    """
    return asyncio.run(_ask(url, model, conversations, places, tools, max_tokens))


async def _ask(url, model, conversations, places, tools, max_tokens):
    import httpx2
    from tqdm import tqdm

    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"the key in {KEY} holds characters that no key has; set it anew")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = httpx2.Timeout(None, connect=REACHED_WITHIN)
    direct = dict.fromkeys(("all://127.0.0.1", "all://localhost", "all://[::1]"))  # whatever HTTP_PROXY says
    async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=timeout, mounts=direct) as client:
        listed = 0
        if model is None:
            models = names_of(await _send(client, "GET", "models"))
            if not models:
                raise UserError(f"{url} lists no models; name its model: --model …")
            model, listed = models[0], len(models)
        model = _clean(model)
        settings = {"model": model, "temperature": 0, "max_tokens": max_tokens}
        form = {"type": "object", "properties": {}}
        functions = [{"type": "function", "function": {"name": name, "parameters": form}} for name in tools]
        # With no parser for calls, vLLM refuses questions that declare a tool, and so does llama.cpp without
        # --jinja; the first question, asked alone, finds that out.
        declared, refusal = {"tools": functions}, None

        async def one(number):
            body = {**settings, **declared, "messages": conversations[number]}
            try:
                return reply_of(await _send(client, "POST", "chat/completions", body))
            except UserError as error:
                error.args = (f"{places[number]}: {error}",)
                raise

        bar = tqdm(total=len(conversations), desc="answering", unit="row", leave=False, disable=None)
        with bar:
            try:
                replies = [await one(0)]
            except Refused as error:
                declared, refusal = {}, error.reason
                try:
                    replies = [await one(0)]
                except Refused:
                    raise error from None
            bar.update()
            gate = asyncio.Semaphore(AT_ONCE)

            async def next_one(number):
                async with gate:
                    reply = await one(number)
                bar.update()
                return reply

            replies += await asyncio.gather(*map(next_one, range(1, len(conversations))))
    return model, listed, replies, refusal


async def _send(client, method, path, body=None):
    """Returns an answer's JSON; a busy endpoint is asked again for PATIENCE. Raises UserError, or Refused."""
    import httpx2

    url = str(client.base_url).rstrip("/")
    began, pause = time.monotonic(), 1
    while True:
        try:
            response = await asyncio.wait_for(client.request(method, path, json=body), TIMEOUT)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            reason = printable(str(error), 100) or f"no connection within {REACHED_WITHIN} s"
            cure = "start the server, or mend the address"
            raise UserError(f"{url} cannot be reached ({reason}); {cure}") from None
        except asyncio.TimeoutError:
            raise UserError(f"{url} gave no answer within {TIMEOUT} s; see its log") from None
        except httpx2.HTTPError as error:
            reason = printable(str(error), 100) or type(error).__name__
            raise UserError(f"{url} broke off ({reason}); see its log, then ask again") from None
        if response.status_code not in (429, 503):
            break
        after = response.headers.get("Retry-After", "")
        wait = max(1, int(after)) if re.fullmatch("[0-9]{1,6}", after) else pause
        if time.monotonic() - began + wait > PATIENCE:
            said = _reason(response, client)
            raise UserError(f"{url} stays busy ({response.status_code}: {said}); ask again later")
        await asyncio.sleep(wait)
        pause = min(2 * pause, 8)
    if response.is_success:
        try:
            return response.json()
        except (ValueError, RecursionError):
            kind = printable(response.headers.get("Content-Type", "of no type"))
            raise UserError(f"{url} answers with no JSON ({kind}); {OTHER_ADDRESS}") from None
    raise _failure(url, response, _reason(response, client), path)


def _failure(url, response, reason, path):
    """Returns the error for an answer that is none, with the cure."""
    status = response.status_code
    if status in (401, 403):
        if "Authorization" in response.request.headers:
            return UserError(f"{url} does not take the key in {KEY} ({status}); set the right one")
        return UserError(f"{url} wants a key ({status}); set {KEY}")
    if response.is_redirect:
        return UserError(f"{url} has moved ({status}); name the address that it moved to")
    said = f"{status}: {reason}"
    other = ", or name its model with --model" if path == "models" else ""  # not every server lists them
    if status == 404 and path != "models" and "model" in reason.lower():
        return UserError(f"{url} refuses ({said}); name a model that it has with --model")
    if status in (404, 405):
        cure = "end its address in /v1" + (other or ", and name a model that it has")
        return UserError(f"{url} has no /{path} ({said}); {cure}")
    if re.search("context|too long|max_model_len", reason, re.IGNORECASE):
        cure = "serve with a longer context (vLLM: --max-model-len, llama.cpp: --ctx-size)"
    else:
        cure = ("see its log" if status >= 500 else "mend how it is served") + other
    return Refused(f"{url} refuses ({said}); {cure}", said)


def _reason(response, client):
    """Returns what the body of an error says, in one line; never the key, which a server may repeat."""
    try:
        found = response.json()
        # OpenAI's {"error": {"message": …}}, FastAPI's {"detail": …}
        for name in ("error", "message", "detail"):
            found = found.get(name, found) if isinstance(found, dict) else found
        text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
    except (ValueError, RecursionError):
        text = response.text if response.headers.get("Content-Type", "").startswith("text/plain") else ""
    if key := client.headers.get("Authorization", "").removeprefix("Bearer "):
        text = text.replace(key, "…")
    return printable(text.strip() or response.reason_phrase or "no reason given", 200)


def names_of(data):
    """Returns the names in an answer of /models, in order; raises UserError if it is none."""
    models = data.get("data") if isinstance(data, dict) else None
    names = (
        [m.get("id") if isinstance(m, dict) else None for m in models] if isinstance(models, list) else [None]
    )
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"the endpoint's list of models is none; {OTHER_ADDRESS}")
    return names


def reply_of(data):
    """Returns the Reply of a chat completion; raises UserError if it is none."""
    try:
        choice = data["choices"][0]
        message = choice["message"]
        content, calls = message.get("content"), message.get("tool_calls") or []
        content = "" if content is None else content
        called = [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
        tags = [
            tool_call.format_tag(name, arguments if isinstance(arguments, str) else json.dumps(arguments))
            for name, arguments in called
        ]
        tagged = sum(isinstance(part, tool_call.Call) for part in tool_call.split_text(content)[0])
    except (LookupError, TypeError, AttributeError):
        raise UserError(f"the answer is no chat completion; {OTHER_ADDRESS}") from None
    text = "\n".join([content] * (bool(content.strip()) or not tags) + tags)
    return Reply(_clean(text), choice.get("finish_reason") != "length", len(tags), tagged)


def _clean(text):
    return text.encode("utf-8", "replace").decode()  # half a surrogate pair, which JSON can hold
