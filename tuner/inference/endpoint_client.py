"""Talk HTTP to an OpenAI-style endpoint; where no answer comes, say in one line why."""

import asyncio
import json
import os
import re
import time
from urllib.parse import urlsplit

import httpx2  # what huggingface_hub talks through

from tuner.system.console import printable
from tuner.system.errors import UserError

TIMEOUT = 300  # seconds for a whole answer; a CPU that answers four at once takes one or two minutes
MAX_BYTES = 4 * 2**20  # of a response, decompressed; the longest lists of models have some 500 KB
CONNECT_TIMEOUT = 10  # seconds
BUSY_TIMEOUT = 60  # seconds that an endpoint may stay busy (429, 503), all waits together
MAX_DROPPED = 2  # connections that may be closed on one request before it is answered
KEY = "OPENAI_API_KEY"
WRONG_SERVER = "check that --endpoint is an OpenAI-style server, path included: …/v1"


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


def connect(url):
    """Return the HTTP client for an endpoint, with the key from the environment."""
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{KEY} contains characters that no API key has; set it again")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = httpx2.Timeout(None, connect=CONNECT_TIMEOUT)
    direct = dict.fromkeys(("all://127.0.0.1", "all://localhost", "all://[::1]"))  # whatever HTTP_PROXY says
    return httpx2.AsyncClient(base_url=url, headers=headers, timeout=timeout, mounts=direct)


async def send(client, method, path, body=None):
    """Return a response's JSON, of a stream the list of its events' JSON.

    Retry a busy endpoint for BUSY_TIMEOUT. Raise UserError or RefusedError.
    """
    url = str(client.base_url).rstrip("/")
    started, pause, dropped = time.monotonic(), 1, 0
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
            # llama.cpp closes one in some hundred connections that are kept open, as a request arrives on it.
            if str(error).startswith("Server disconnected without") and dropped < MAX_DROPPED:
                dropped += 1
                continue
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
    kind = printable(response.headers.get("Content-Type", "no content type"))
    if response.is_success:
        try:
            return _events(content) if kind.startswith("text/event-stream") else json.loads(content)
        except (ValueError, RecursionError):
            raise UserError(f"{url} does not answer in JSON ({kind}); {WRONG_SERVER}") from None
    raise _failure(url, response, _reason(response, content, client), path)


def _events(content):
    """Return the JSON of each server-sent event in a response's bytes, without the last one, [DONE]."""
    lines = (line.strip() for line in content.decode().split("\n"))
    data = [line.removeprefix("data:").strip() for line in lines if line.startswith("data:")]
    return [json.loads(text) for text in data if text != "[DONE]"]


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
