"""An OpenAI-style endpoint in miniature: answers by a function of the question, and fails on request."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Endpoint:
    """Serve /v1 on 127.0.0.1: `models`, and as a completion what `say(body)` returns.

    A status, or (status, headers, bytes), in place of an answer is sent as it is; a status of None hangs up.
    In place of the bytes may stand pieces of them, which may never end. A completion is streamed where the
    question says so: letter by letter, and each call in two pieces.
    `failures`: what comes first, whatever is asked. `requests` records every request, `most` how many
    questions there were at once.
    """

    def __init__(self, say, models=("tuned", "base")):
        self.say, self.models, self.failures = say, models, []
        self.requests = []  # (method, path, headers, body)
        self.now = self.most = 0
        lock, endpoint = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                endpoint.answer(self, None)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    endpoint.now += 1
                    endpoint.most = max(endpoint.most, endpoint.now)
                try:
                    endpoint.answer(self, body)
                finally:
                    with lock:
                        endpoint.now -= 1

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # a client that hung up; it would print into a later test
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request, body):
        headers = {key.lower(): value for key, value in request.headers.items()}
        self.requests.append((request.command, request.path, headers, body))
        if self.failures:
            response = self.failures.pop(0)
        elif request.path == "/v1/models":
            response = {"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]}
        elif request.path == "/v1/chat/completions":
            response = self.say(body)
        else:
            response = 404
        if isinstance(response, int):
            response = response, {}, b'{"error": {"message": "no"}}'
        if isinstance(response, dict) and (body or {}).get("stream"):
            response = 200, {"Content-Type": "text/event-stream; charset=utf-8"}, events(response)
        elif isinstance(response, dict):
            response = 200, {"Content-Type": "application/json"}, json.dumps(response).encode()
        status, headers, content = response
        if status is None:  # hangs up
            request.close_connection = True
            return
        request.send_response(status)
        length = {"Content-Length": str(len(content))} if isinstance(content, bytes) else {}
        for key, value in {**length, **headers}.items():
            request.send_header(key, value)
        request.end_headers()
        for piece in [content] if isinstance(content, bytes) else content:
            request.wfile.write(piece)


def completion(content, finish="stop", **message):
    """A chat completion as vLLM and llama.cpp write it."""
    message = {"role": "assistant", "content": content, **message}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return {"id": "chatcmpl-1", "object": "chat.completion", "model": "tuned", "choices": [choice]}


def calling(*calls, content=None):
    """A completion with calls, each (name, arguments), parsed."""
    parsed = [
        {"id": f"call-{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(calls)
    ]
    return completion(content, "tool_calls", tool_calls=parsed)


def events(completion):
    """Return a completion as the bytes of its stream."""
    choice = completion["choices"][0]
    deltas = [{"role": "assistant", "content": None}]
    deltas += [{"content": letter} for letter in choice["message"].get("content") or ""]
    for index, call in enumerate(choice["message"].get("tool_calls") or []):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        head = {"id": call["id"], "type": "function", "function": {"name": name, "arguments": ""}}
        deltas += [{"tool_calls": [{"index": index, **head}]}]
        deltas += [{"tool_calls": [{"index": index, "function": {"arguments": arguments}}]}]
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}]})
    chunks.append({"choices": [], "usage": {"total_tokens": 3}})
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks).encode() + b"data: [DONE]\n\n"
