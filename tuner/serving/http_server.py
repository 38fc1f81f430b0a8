"""The HTTP server: who may ask, one answer at a time, the page."""

import asyncio
import base64
import errno
import hashlib
import html
import ipaddress
import re
import secrets
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from tuner.inference import generation
from tuner.inference.probes import PROBES
from tuner.serving.chat_completions import (
    BUG,
    ChatCompletionRequest,
    Finish,
    complete_answer,
    error_body,
    http_error,
    make_generation,
    parse_request,
    split_at_stop,
    stream_events,
)
from tuner.system import scripts
from tuner.system.console import printable
from tuner.system.errors import UserError

KEY = "SERVE_API_KEY"
PAGE = Path(__file__).with_name("page.html")
LOOPBACK = re.compile(r"(localhost|127\.0\.0\.1|\[::1])(:[0-9]+)?", re.IGNORECASE)
MAX_BODY = 2**19  # bytes; CONTEXT tokens of Cyrillic, each letter written as \u0430, take some 200,000
BODY_SECONDS = 10  # that it may take to come
CONTEXT = 8192  # tokens, prompt and answer; on 4B their cache takes 1.1 GB beside the weights
QUEUE = 16  # requests that wait for the one being answered; more are told to come again
RETRY_AFTER = 2  # seconds, what these are told
BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a token that is one byte of a character, or of several


def authorize(request, key):
    """Raises a refusal for who may not ask: a page of another site, or a program without the key."""
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    # Another site's name may be made to lead to this machine; a browser then takes its page for ours.
    if not key and not LOOPBACK.fullmatch(host):
        raise http_error(403, f"without {KEY}, this server is called localhost only")
    if origin is not None and origin.lower().split("://")[-1] != host.lower():
        raise http_error(403, "a page of another site may not ask this server")
    if key and request.scope["path"].startswith("/v1/"):  # request.url would read the Host header too
        given = request.headers.get("authorization", "").encode("latin-1")
        if not secrets.compare_digest(given, f"Bearer {key}".encode()):
            message = f"the API key is missing or wrong; send what {KEY} holds on the server"
            raise http_error(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


async def read_request(request: Request):
    """Returns the request's body as Asked; raises a refusal for one that is none."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise http_error(415, "the content type is not application/json")  # which no foreign form can send
    body, size, announced = bytearray(), 0, int(request.headers.get("content-length", 0))

    async def receive():
        nonlocal size
        async for chunk in request.stream():
            size += len(chunk)
            if size <= MAX_BODY:
                body.extend(chunk)
            elif max(size, announced) > 16 * MAX_BODY:  # less is read to its end, so that the answer arrives
                return

    try:
        await asyncio.wait_for(receive(), BODY_SECONDS)
    except ClientDisconnect:
        raise http_error(400, "the request ended before its end") from None
    except asyncio.TimeoutError:
        raise http_error(408, f"the request did not come within {BODY_SECONDS} s") from None
    if max(size, announced) > MAX_BODY:
        text, close = f"the request is larger than {MAX_BODY} bytes", {"Connection": "close"}
        raise http_error(413, text, "request_too_large", headers=close)
    return parse_request(bytes(body))


def stream_answer(model, tokenizer, job, say):
    """Has the model write, and gives say(text) each piece once nothing can change it; returns the End."""
    import torch

    asked, ends = job.asked, generation.end_tokens(model)
    stops = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    count, undecoded, held, ended, stopped = 0, [], "", False, False

    def give():
        nonlocal held, stopped
        held += tokenizer.decode(undecoded, skip_special_tokens=False)
        undecoded.clear()
        said, held, stopped = split_at_stop(held, stops)
        if said:
            say(said)

    def on_token(tokens):
        nonlocal count, ended
        count += 1
        ended = tokens[0] in ends
        if not ended:
            undecoded.append(tokens[0])
            # What bytes stand for is settled by the first token after them that is none.
            if not BYTE.fullmatch(tokenizer.convert_ids_to_tokens(tokens[0]) or ""):
                give()
        return ended or stopped or job.gone.is_set()

    settings = {"max_new_tokens": job.new}
    if asked.temperature:
        settings |= {"do_sample": True, "temperature": asked.temperature, "top_p": asked.top_p}
        torch.seed() if asked.seed is None else torch.manual_seed(asked.seed)
    generation.generate(model, tokenizer, [job.ids], on_token, **settings)
    if undecoded:
        give()
    if held:
        say(held)
    return Finish("stop" if ended or stopped else "length", count)


def make_app(model, tokenizer, names, key, jobs):
    """Returns the server's app. names: of the models, the second is the base; jobs: {}, for those in hand."""
    pool = ThreadPoolExecutor(1)  # one answer at a time: the same whoever else asks, unlike in a batch
    context = min(CONTEXT, model.config.get_text_config().max_position_embeddings)
    page, policy = read_page()

    async def guarded(request: Request):
        authorize(request, key)

    # No docs: their pages load scripts of another site.
    app = FastAPI(openapi_url=None, dependencies=[Depends(guarded)])

    @app.exception_handler(HTTPException)
    def refused(request, error):
        print(f"refused    {error.status_code} {request.method} {printable(request.scope['path'])}")
        return JSONResponse(error_body(error.status_code, error.detail), error.status_code, error.headers)

    @app.exception_handler(Exception)
    def failed(request, error):
        return JSONResponse(error_body(500, BUG), 500)

    def work(job, put):
        started = time.perf_counter()
        try:
            if job.model == names[0]:
                end = stream_answer(model, tokenizer, job, put)
            else:
                with model.disable_adapter():
                    end = stream_answer(model, tokenizer, job, put)
            how, seconds = "hung up" if job.gone.is_set() else end.reason, time.perf_counter() - started
            print(f"{job.model:<10} {len(job.ids)} + {end.tokens} tokens, {seconds:.1f} s, {how}")
            put(end)
        except Exception as error:
            if scripts.is_out_of_memory(error):
                error = http_error(503, "the GPU's memory is full; ask for less, or serve with --bits 4")
                print(f"{job.model:<10} {error.detail['message']}", file=sys.stderr)
            put(error)

    async def leave(request, job, future):
        """Drops the work once the client has hung up; if it had its answer, there is none left to drop."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        job.gone.set()
        future.cancel()
        job.pieces.put_nowait(http_error(499, "the client has hung up"))  # as nginx calls it

    @app.post("/v1/chat/completions")
    async def chat(request: Request, asked: Annotated[ChatCompletionRequest, Depends(read_request)]):
        if len(jobs) > QUEUE:
            text = f"{QUEUE} requests wait already; come again in {RETRY_AFTER} s"
            raise http_error(429, text, "queue_full", headers={"Retry-After": str(RETRY_AFTER)})
        job, loop = make_generation(asked, names, tokenizer, context), asyncio.get_running_loop()
        future = pool.submit(work, job, lambda p: loop.call_soon_threadsafe(job.pieces.put_nowait, p))
        watch = asyncio.create_task(leave(request, job, future))
        jobs[watch] = job
        watch.add_done_callback(jobs.pop)
        if asked.stream:
            headers = {"Cache-Control": "no-store", "Content-Type": "text/event-stream"}
            return StreamingResponse(stream_events(job), headers=headers)
        return JSONResponse(await complete_answer(job))

    @app.get("/v1/models")
    async def models():
        facts = {"object": "model", "created": 0, "owned_by": "local", "max_model_len": context}
        return {"object": "list", "data": [{"id": name, **facts} for name in names]}

    @app.get("/health")
    async def health():
        return {"status": "ok"}

    @app.get("/")
    async def home():
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "Cache-Control": "no-store"})

    return app


def make_server(app, jobs, on_start=lambda: None):
    """Returns the uvicorn.Server of an app; when it is stopped, the requests in hand are broken off.

    on_start() is called when it answers, and heeds signals.
    """
    config = {"access_log": False, "log_level": "warning", "server_header": False, "lifespan": "off"}
    server = uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=2 * BODY_SECONDS, **config))

    async def startup(sockets=None):
        await uvicorn.Server.startup(server, sockets)
        on_start()

    async def shutdown(sockets=None):
        for job in jobs.values():
            job.pieces.put_nowait(http_error(503, "the server is stopping"))
        await uvicorn.Server.shutdown(server, sockets)

    server.startup, server.shutdown = startup, shutdown
    return server


def read_page():
    """Returns the page, and the Content-Security-Policy by which it runs and loads nothing but its own."""
    probes = "".join(f"<button>{html.escape(prompt)}</button>\n" for prompt, _ in PROBES)
    page = PAGE.read_text(encoding="utf-8").replace("<!-- probes -->", probes)
    page = page.replace("MAX_NEW_TOKENS", str(generation.MAX_NEW_TOKENS))
    rules = ["default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'"]
    rules += ["form-action 'none'", "frame-ancestors 'none'"]
    for tag in ("style", "script"):
        source = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1].encode()
        rules.append(f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(source).digest()).decode()}'")
    return page, "; ".join(rules)


def listen(host, port, key):
    """Returns a socket that listens; raises UserError if it cannot, or lets others in without a key."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        reason = (getattr(error, "strerror", None) or "no such name").split(" (while")[0]
        cure = "name an address of this machine with --host"
        if getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES):
            cure = "name another port with --port, or end the program that has it"
        place = f"port {port} of {printable(host)}"
        raise UserError(f"{place} cannot be listened on ({reason}); {cure}") from None
    if not key and not ipaddress.ip_address(listening.getsockname()[0]).is_loopback:
        listening.close()
        raise UserError(f"--host {host} lets others in; set {KEY} to a long random word, and give it to them")
    return listening
