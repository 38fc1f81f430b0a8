"""The HTTP server: who is let in, the routes, one answer at a time."""

import asyncio
import gc
import re
import secrets
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Annotated

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

from tuner.inference.generation import row_decoder
from tuner.serving.chat_completions import (
    INTERNAL_ERROR,
    complete_answer,
    error_body,
    http_error,
    make_generation,
    parse_request,
    stream_events,
)
from tuner.serving.listening import KEY
from tuner.serving.page import read_page
from tuner.serving.streaming import stream_answer
from tuner.system.console import printable
from tuner.system.scripts import is_out_of_memory

LOOPBACK = re.compile(r"(localhost|127\.0\.0\.1|\[::1])(:[0-9]+)?", re.IGNORECASE)
MAX_BODY = 2**19  # bytes; CONTEXT tokens of Cyrillic, each letter written as \u0430, take some 200,000
READ_SIZE = 2**14  # bytes at a time; 256 KB, asyncio's own, of chunks of one byte hold up the loop for 1.6 s
BODY_SECONDS = 10  # that it may take to come
CONTEXT = 8192  # tokens, prompt and answer; on 4B their cache takes 1.1 GB beside the weights
QUEUE = 16  # requests that wait for the one being answered; more are refused
STOPPING = "the server is stopping"
RETRY_AFTER = 2  # seconds, the Retry-After of these


# ------------------------------------------------------------------------------------------ requests


def authorize(request, key):
    """Raise an HTTP error for a page of another site, or a program without the key."""
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    # Another site's name may be made to lead to this machine; a browser then takes its page for ours.
    if not key and not LOOPBACK.fullmatch(host):
        raise http_error(403, f"without {KEY} only requests to localhost are accepted")
    if origin is not None and origin.lower().split("://")[-1] != host.lower():
        raise http_error(403, "cross-origin requests are not allowed")
    if key and request.scope["path"].startswith("/v1/"):  # request.url would read the Host header too
        authorization = request.headers.get("authorization", "").encode("latin-1")
        if not secrets.compare_digest(authorization, f"Bearer {key}".encode()):
            message = f"the API key is missing or wrong; send the value of {KEY} on the server"
            raise http_error(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


async def read_body(request: Request):
    """Return the body, bytes that are called JSON; raise an HTTP error if they are too many or too slow."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise http_error(415, "the content type must be application/json")  # which no foreign form can send
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
        raise http_error(400, "the request body is incomplete") from None
    except asyncio.TimeoutError:
        raise http_error(408, f"the request did not arrive within {BODY_SECONDS} s") from None
    if max(size, announced) > MAX_BODY:
        text, close = f"the request is larger than {MAX_BODY} bytes", {"Connection": "close"}
        raise http_error(413, text, "request_too_large", headers=close)
    return bytes(body)


# --------------------------------------------------------------------------------------- the service


class ChatService:
    """Answer chat completions with one model, one at a time: the same whoever else asks, unlike in a batch.

    names: of the models that it is; the second is the base, the model with its adapter off.
    key: what clients have to send, "" for nothing. probes: the Questions on the page, None for none.
    """

    def __init__(self, model, tokenizer, names, key, probes=None):
        self.model, self.tokenizer, self.names, self.key = model, tokenizer, names, key
        self.context = min(CONTEXT, model.config.get_text_config().max_position_embeddings)
        # Of 500 KB each may take a second, in which the event loop answers others.
        self.preparer, self.preparing = ThreadPoolExecutor(1), 0
        self.worker = ThreadPoolExecutor(1)
        self.decoder = row_decoder(model)
        self.generations = {}  # those asked for and not yet finished, by the task that watches the client
        self.stopping = False
        self.page, self.page_policy = read_page(probes)

    def make_app(self):
        """Return the FastAPI application, without docs: their pages load scripts of another site."""
        app = FastAPI(openapi_url=None, dependencies=[Depends(self.authorize)])
        app.exception_handler(HTTPException)(self.refuse)
        app.exception_handler(Exception)(self.fail)
        app.post("/v1/chat/completions")(self.chat)
        app.get("/v1/models")(self.models)
        app.get("/health")(self.health)
        app.get("/")(self.home)
        return app

    async def authorize(self, request: Request):
        authorize(request, self.key)

    def refuse(self, request, error):
        body = error_body(error.status_code, error.detail)
        route = f"{request.method} {printable(request.scope['path'])}"
        print(f"refused    {error.status_code} {route}: {body['error']['message']}")
        return JSONResponse(body, error.status_code, error.headers)

    def fail(self, request, error):
        return JSONResponse(error_body(500, INTERNAL_ERROR), 500)

    async def chat(self, request: Request, body: Annotated[bytes, Depends(read_body)]):
        if len(self.generations) + self.preparing > QUEUE:
            text = f"{QUEUE} requests are waiting already; try again in {RETRY_AFTER} s"
            raise http_error(429, text, "queue_full", headers={"Retry-After": str(RETRY_AFTER)})
        loop = asyncio.get_running_loop()
        self.preparing += 1
        try:
            generation = await loop.run_in_executor(self.preparer, self.prepare, body)
        finally:
            self.preparing -= 1
        if self.stopping:
            raise http_error(503, STOPPING)

        def emit(part):
            loop.call_soon_threadsafe(generation.output.put_nowait, part)

        future = self.worker.submit(self.generate, generation, emit)
        watch = asyncio.create_task(self.cancel_on_disconnect(request, generation, future))
        self.generations[watch] = generation
        watch.add_done_callback(self.generations.pop)
        if generation.request.stream:
            headers = {"Cache-Control": "no-store", "Content-Type": "text/event-stream"}
            return StreamingResponse(stream_events(generation), headers=headers)
        return JSONResponse(await complete_answer(generation))

    def prepare(self, body):
        """Return the Generation that a body asks for; raise an HTTP error; in the preparer's thread."""
        return make_generation(parse_request(body), self.names, self.tokenizer, self.context)

    def switched_to(self, name):
        """Return the context in which the model is the one of this name."""
        return nullcontext() if name == self.names[0] else self.model.disable_adapter()

    def warm_up(self):
        """Capture graphs, so that the first request need not wait for that; in the worker's thread."""
        for name in self.names if self.decoder else []:
            with self.switched_to(name):
                self.decoder.warm_up(name)

    def generate(self, generation, emit):
        """Emit an answer's parts, then its Finish or the exception that ended it; in the worker's thread."""
        started = time.perf_counter()
        try:
            with self.switched_to(generation.model):
                finish = stream_answer(self.model, self.tokenizer, generation, emit, self.decoder)
            seconds = time.perf_counter() - started
            reason = "client disconnected" if generation.disconnected.is_set() else finish.reason
            counts = f"{len(generation.prompt_ids)} prompt + {finish.tokens} completion tokens"
            print(f"{generation.model:<10} {counts}, {seconds:.1f} s, {reason}")
            emit(finish)
        except Exception as error:
            if is_out_of_memory(error):
                error = http_error(503, "GPU out of memory; send a shorter request, or serve with --bits 4")
                print(f"{generation.model:<10} {error.detail['message']}", file=sys.stderr)
            emit(error)

    async def cancel_on_disconnect(self, request, generation, future):
        """Stop the work once the client has disconnected; if it had its answer, there is none to stop."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        generation.disconnected.set()
        future.cancel()
        generation.output.put_nowait(http_error(499, "the client disconnected"))  # as nginx calls it

    async def models(self):
        properties = {"object": "model", "created": 0, "owned_by": "local", "max_model_len": self.context}
        return {"object": "list", "data": [{"id": name, **properties} for name in self.names]}

    async def health(self):
        return {"status": "ok"}

    async def home(self):
        headers = {"Content-Security-Policy": self.page_policy, "Cache-Control": "no-store"}
        return HTMLResponse(self.page, headers=headers)


class Protocol(H11Protocol):
    """Read little at a time, so that other connections have their turn in between."""

    def connection_made(self, transport):
        transport.max_size = READ_SIZE
        super().connection_made(transport)


class Server(uvicorn.Server):
    """Run a ChatService; when it is stopped, break off the requests that it is answering.

    on_start() is called once it answers and handles signals.
    """

    def __init__(self, service, on_start=lambda: None):
        config = {"access_log": False, "log_level": "warning", "server_header": False, "lifespan": "off"}
        config |= {"http": Protocol, "loop": "asyncio"}
        app = service.make_app()
        super().__init__(uvicorn.Config(app, timeout_graceful_shutdown=2 * BODY_SECONDS, **config))
        self.service, self.on_start = service, on_start

    async def startup(self, sockets=None):
        gc.freeze()  # or a full collection visits all that the libraries have loaded: 0.6 s without an answer
        await asyncio.wrap_future(self.service.worker.submit(self.service.warm_up))
        await super().startup(sockets)
        self.on_start()

    async def shutdown(self, sockets=None):
        self.service.stopping = True
        for generation in self.service.generations.values():
            generation.output.put_nowait(http_error(503, STOPPING))
        await super().shutdown(sockets)


def handle_hangup():
    """Make uvicorn stop on SIGHUP as on SIGTERM, unless it is ignored; ours would break off its loop."""
    handled = uvicorn.server.HANDLED_SIGNALS
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup and hangup not in handled and signal.getsignal(hangup) != signal.SIG_IGN:
        uvicorn.server.HANDLED_SIGNALS += (hangup,)
