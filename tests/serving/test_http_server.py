"""The HTTP server: what it refuses and to whom, many clients, those that disconnect, errors."""

import asyncio
import concurrent.futures
import contextlib
import http.client
import json
import socket
import threading
import time

import httpx2
import openai
import pytest
import torch

from tests.support.chat_client import JSON, TOOLS, USER, ask, client_of, join_stream, post
from tests.support.echo_server import eventually, serving
from tuner.inference import generation
from tuner.serving import http_server

# ------------------------------------------------------------------------------------ what is refused

RESULT = {"role": "tool", "tool_call_id": "1", "content": "b"}
STOP = "stop: expected a string, or up to 4, none of them empty"
BAD = [
    (b"", 400, "JSON", None),
    (b"[1]", 400, "object", None),
    (b'{"messages": [{"role": "user", "content": "\xff"}]}', 400, "JSON", None),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "JSON", None),
    (b'{"messages": ' + b"[" * 100_000, 400, "JSON", None),
    ({}, 400, "messages: Field required", "messages"),
    ({"messages": []}, 400, '"messages" is an empty list', "messages"),
    ({"messages": "a"}, 400, "messages: ", "messages"),
    ({"messages": [1]}, 400, "messages.0: ", "messages"),
    ({"messages": [{"role": "user", "content": ""}]}, 400, "message 1: the content is empty", "messages"),
    ({"messages": [{"role": "robot", "content": "a"}]}, 400, "message 1: the role is", "messages"),
    ({"messages": [{"role": "system", "content": "a"}]}, 400, 'message is from "system"', "messages"),
    ({"messages": [USER, {"role": "assistant", "content": "b"}]}, 400, 'from "assistant"', "messages"),
    ({"messages": [USER, RESULT]}, 400, "message 2: ", "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "message 1: ", "messages"),
    ({"messages": [USER], "n": 2}, 400, "n: ", "n"),
    ({"messages": [USER], "response_format": {"type": "json_object"}}, 400, "'text'", "response_format"),
    ({"messages": [USER], "tool_choice": "required"}, 400, 'use "auto" or "none"', "tool_choice"),
    ({"messages": [USER], "temperature": 2.1}, 400, "temperature: ", "temperature"),
    ({"messages": [USER], "temperature": "1"}, 400, "temperature: ", "temperature"),
    ({"messages": [USER], "temperature": float("nan")}, 400, "temperature: ", "temperature"),
    ({"messages": [USER], "temperature": 1e308}, 400, "temperature: ", "temperature"),
    ({"messages": [USER], "top_p": float("-inf")}, 400, "top_p: ", "top_p"),
    ({"messages": [USER], "seed": float("inf")}, 400, "seed: ", "seed"),
    ({"messages": [USER], "seed": 1.5}, 400, "seed: ", "seed"),
    ({"messages": [USER], "max_tokens": True}, 400, "max_tokens: ", "max_tokens"),
    ({"messages": [USER], "top_p": 0}, 400, "top_p: ", "top_p"),
    ({"messages": [USER], "seed": 2**63}, 400, "seed: ", "seed"),
    ({"messages": [USER], "stop": ["a"] * 5}, 400, STOP, "stop"),
    ({"messages": [USER], "stop": ""}, 400, STOP, "stop"),
    ({"messages": [USER], "stop": "a" * 501}, 400, STOP, "stop"),
    ({"messages": [USER], "stop": ["a" * 250_000, "b" * 250_000]}, 400, STOP, "stop"),
    ({"messages": [USER], "stop": [""]}, 400, STOP, "stop"),
    ({"messages": [USER], "max_tokens": 0}, 400, "max_tokens: ", "max_tokens"),
    ({"messages": [USER], "max_completion_tokens": -1}, 400, "max_completion", "max_completion_tokens"),
    ({"messages": [USER], "logprobs": True}, 400, "logprobs: ", "logprobs"),
    ({"messages": [USER], "logit_bias": {"1": 5}}, 400, "logit_bias: ", "logit_bias"),
    ({"messages": [USER], "presence_penalty": 1}, 400, "presence_penalty: ", "presence_penalty"),
    ({"messages": [USER], "frequency_penalty": 0.5}, 400, "frequency_penalty: ", "frequency_penalty"),
    ({"messages": [USER], "model": "gpt-\x1b[31m"}, 404, '"gpt-\ufffd[31m" not found', "model"),
    ({"messages": [USER] * 4097}, 400, "4097 messages exceed the context of 4096", "messages"),
    ({"messages": [{"role": "user", "content": "a" * 130_000}]}, 400, "at least 4197 prompt", "messages"),
    ({"messages": [{"role": "user", "content": "ъ" * 4096}]}, 400, "exceed the context of 4096", "messages"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "says", "param"), BAD, ids=range(len(BAD)))
def test_what_is_wrong_with_a_request_is_reported_in_openais_form(echoing, capfd, body, status, says, param):
    answer = post(echoing, body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert says in error["message"]
    assert error["message"].isprintable()
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert "code" in error
    out, err = capfd.readouterr()
    logged = f"refused    {status} POST /v1/chat/completions: {error['message']}\n"
    assert (out, err) == (logged, "")


def test_the_clients_own_errors(echoing):
    with pytest.raises(openai.NotFoundError, match='model "gpt-4" not found; available: tuned') as error:
        ask(echoing, "a", model="gpt-4")
    assert (error.value.code, error.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as error:
        ask(echoing, "a" * 4096, stream=True)
    assert error.value.code == "context_length_exceeded"


def test_fields_that_it_does_not_know_and_those_that_change_nothing_are_ignored(echoing):
    unknown = {"user": "x", "store": False, "parallel_tool_calls": True}
    idle = {"n": 1, "response_format": {"type": "text"}, "logprobs": False, "logit_bias": {}, "stop": None}
    idle |= {"presence_penalty": 0, "frequency_penalty": 0.0, "tool_choice": "auto", "temperature": 0}
    answer = post(echoing, {"messages": [{**USER, "name": "Anna"}], **unknown, **idle})
    assert answer.json()["choices"][0]["message"]["content"] == "a"
    assert answer.json()["model"] == "tuned"


def test_other_routes(echoing, capfd):
    assert httpx2.get(f"{echoing.url}/health").json() == {"status": "ok"}
    models = client_of(echoing).models.list().data
    assert [(model.id, model.object) for model in models] == [("tuned", "model")]
    capfd.readouterr()
    for method, path, status in [("GET", "/v1/no%1B[31m", 404), ("GET", "/v1/chat/completions", 405),
                                 ("GET", "/docs", 404), ("GET", "/openapi.json", 404)]:  # fmt: skip
        answer = httpx2.request(method, echoing.url + path)
        assert answer.status_code == status
        assert "/v1/chat/completions" in answer.json()["error"]["message"]
    out = capfd.readouterr().out
    assert "refused    404 GET /v1/no\ufffd[31m: Not Found; available: /v1/chat/completions, " in out


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", None])
def test_a_body_that_is_not_said_to_be_json_is_refused(echoing, content_type):
    body = json.dumps({"messages": [USER]})
    headers = {"Content-Type": content_type} if content_type else {}
    answer = httpx2.post(f"{echoing.url}/v1/chat/completions", content=body.encode(), headers=headers)
    assert (answer.status_code, answer.json()["error"]["type"]) == (415, "invalid_request_error")
    assert post(
        echoing, {"messages": [USER]}, **{"Content-Type": "application/JSON; charset=utf-8"}
    ).is_success


@pytest.mark.parametrize("size", [http_server.MAX_BODY, http_server.MAX_BODY + 1, 3 * http_server.MAX_BODY])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_may_not_be_larger_than_the_limit(echoing, size, chunked):
    body = json.dumps({"messages": [USER], "user": ""}).encode()
    body = body[:-2] + b"x" * (size - len(body)) + body[-2:]
    pieces = (body[i : i + 10_000] for i in range(0, size, 10_000))
    answer = httpx2.post(
        f"{echoing.url}/v1/chat/completions", content=pieces if chunked else body, headers=JSON, timeout=60
    )
    assert (answer.request.headers.get("Content-Length") is None) == chunked
    assert answer.status_code == (200 if size == http_server.MAX_BODY else 413)
    if size > http_server.MAX_BODY:
        assert answer.json()["error"]["code"] == "request_too_large"


@pytest.mark.parametrize("headers", [{"Content-Length": str(10**12)}, {"Transfer-Encoding": "chunked"}])
def test_a_body_without_end_is_broken_off(echoing, headers):
    connection = http.client.HTTPConnection(echoing.url.removeprefix("http://"), timeout=60)
    connection.putrequest("POST", "/v1/chat/completions")
    for name, value in {**JSON, **headers}.items():
        connection.putheader(name, value)
    connection.endheaders()
    piece, sent = b"x" * 2**16, 0
    if "Transfer-Encoding" in headers:
        piece = b"10000\r\n" + piece + b"\r\n"
    with contextlib.suppress(OSError):
        while sent < 200 * http_server.MAX_BODY:
            connection.send(piece)
            sent += len(piece)
    assert sent < 100 * http_server.MAX_BODY  # what the two sides' buffers hold beside
    assert ask(echoing, "a").choices[0].message.content == "a"


# ---------------------------------------------------------------------------------------- who may ask


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:1234"}, 200),  # through a tunnel
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": "evil@localhost"}, 403),
        ({"Host": "LOCALHOST:8000", "Origin": "http://localhost:8000"}, 200),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "[::1"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:3000", "Host": "localhost:8000"}, 403),
        ({"Origin": "http://localhost:8000", "Host": "localhost:8000"}, 200),
        ({"Origin": "http://evil.example", "Host": "evil.example"}, 403),  # a name made to lead here
    ],
)
def test_pages_of_other_sites_get_nothing(echoing, headers, status):
    answer = post(echoing, {"messages": [USER]}, **headers)
    assert answer.status_code == status
    assert not [name for name in answer.headers if name.lower().startswith("access-control")]
    assert httpx2.get(f"{echoing.url}/v1/models", headers=headers).status_code == status
    assert httpx2.get(f"{echoing.url}/", headers=headers).status_code == status


def test_a_key_is_asked_for_on_every_v1_route_and_never_printed(echo, capfd):
    key = "long-word-51c2"
    body = {"messages": [USER]}
    with serving(echo, key) as server:
        bearer = {"Authorization": f"Bearer {key}".encode()}
        wrong = [
            {},
            *({"Authorization": text} for text in ("Bearer wrong", key, "Basic word", b"Bearer \xe9")),
        ]
        for headers in [*wrong, {"Host": "localhost/x?"}]:  # which may not change what the path is
            assert post(server, body, **headers).status_code == 401
            answer = httpx2.get(f"{server.url}/v1/models", headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert httpx2.post(f"{server.url}/v1/chat/completions", headers=bearer | JSON, json=body).is_success
        assert httpx2.get(f"{server.url}/v1/models", headers={**bearer, "Host": "gpu.example"}).is_success
        assert httpx2.get(f"{server.url}/health").is_success
        assert httpx2.get(f"{server.url}/").is_success
        headers = {**bearer, "Origin": "http://evil.example"}
        assert httpx2.get(f"{server.url}/v1/models", headers=headers).status_code == 403
    with serving(echo, "word") as server:
        assert client_of(server, "word").models.list().data
        with pytest.raises(openai.AuthenticationError, match="SERVE_API_KEY"):
            client_of(server, "sword").models.list()
    out, err = capfd.readouterr()
    assert key not in out + err


# ------------------------------------------------------------ many clients, and those that disconnect


def test_fifty_clients_at_once_get_each_their_own(echoing, monkeypatch):
    monkeypatch.setattr(http_server, "QUEUE", 50)
    texts = [f"Вопрос номер {number} {'я' * (number % 7)}." for number in range(50)]

    def one(text):
        if len(text) % 2:
            return join_stream(ask(echoing, text, stream=True))[0]
        return ask(echoing, text).choices[0].message.content

    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        assert list(pool.map(one, texts)) == texts


def test_more_than_may_wait_are_refused_and_may_try_again(echo, monkeypatch):
    monkeypatch.setattr(http_server, "QUEUE", 2)
    monkeypatch.setattr(echo[0], "delay", 0.02)

    def one(server, number):
        answer = post(server, {"messages": [{"role": "user", "content": f"номер {number}"}]})
        if answer.status_code == 429:
            assert answer.headers["Retry-After"] == str(http_server.RETRY_AFTER)
            assert answer.json()["error"]["code"] == "queue_full"
            return 429
        assert answer.json()["choices"][0]["message"]["content"] == f"номер {number}"
        return 200

    with serving(echo) as server, concurrent.futures.ThreadPoolExecutor(50) as pool:
        codes = list(pool.map(lambda number: one(server, number), range(50)))
        assert codes.count(429) >= 20
        assert codes.count(200) >= 3
        eventually(lambda: not server.generations)
        # OpenAI's client retries by itself.
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=9)
        answers = pool.map(
            lambda n: client.chat.completions.create(model="tuned", messages=[USER], max_tokens=1), range(5)
        )
        assert {answer.choices[0].message.content for answer in answers} == {"a"}


def test_requests_that_are_being_read_wait_as_well_and_a_stop_refuses_them(echo, monkeypatch):
    gate, make_generation = threading.Event(), http_server.make_generation
    monkeypatch.setattr(http_server, "QUEUE", 1)
    monkeypatch.setattr(http_server, "make_generation", lambda *a: gate.wait(20) and make_generation(*a))
    shutdown = http_server.Server.shutdown

    async def stop(server, sockets=None):
        asyncio.get_running_loop().call_later(0.1, gate.set)
        await shutdown(server, sockets)

    monkeypatch.setattr(http_server.Server, "shutdown", stop)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        with serving(echo) as server:
            answers = [pool.submit(post, server, {"messages": [USER]}) for _ in range(3)]
            eventually(lambda: any(answer.done() for answer in answers))
        results = sorted((answer.result() for answer in answers), key=lambda answer: answer.status_code)
    assert [answer.status_code for answer in results] == [429, 503, 503]
    assert results[-1].json()["error"]["message"] == http_server.STOPPING


@pytest.mark.parametrize("stream", [True, False])
def test_the_work_of_who_hangs_up_is_dropped(echo, stream, monkeypatch, capfd):
    monkeypatch.setattr(echo[0], "delay", 0.02)
    text = "я" * 400  # eight seconds

    body = json.dumps({"messages": [{"role": "user", "content": text}], "stream": stream})

    def begin(server, count):
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
        connection.request("POST", "/v1/chat/completions", body, JSON)
        eventually(lambda: len(server.generations) == count)
        return connection

    with serving(echo) as server:
        running = begin(server, 1)
        waiting = begin(server, 2)
        waiting.sock.close()
        eventually(lambda: len(server.generations) == 1, 2)  # gone at once, and never begun
        running.sock.close()
        started = time.monotonic()
        assert ask(server, "a").choices[0].message.content == "a"
        assert time.monotonic() - started < 4
        eventually(lambda: not server.generations)
    out = capfd.readouterr().out
    lines = [line for line in out.splitlines() if "completion tokens" in line]
    assert len(lines) == 2, "one broken off, one answered"
    assert lines[0].endswith(", client disconnected")
    assert out.count("refused    499 ") == (0 if stream else 2), (
        "nothing waits for an answer that no one wants"
    )
    assert int(lines[0].split(" + ")[1].split()[0]) < 200


def test_a_client_that_sends_half_a_request_does_no_harm(echoing, capfd):
    with socket.create_connection(("127.0.0.1", int(echoing.url.rsplit(":", 1)[1]))) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b'Content-Length: 100\r\n\r\n{"messages"'
        )
        time.sleep(0.2)
    assert ask(echoing, "a").choices[0].message.content == "a"
    out, err = capfd.readouterr()
    assert err == ""
    assert "refused    400" in out


def test_a_request_that_does_not_come_to_its_end_is_given_up_and_holds_up_no_stop(echo, monkeypatch, capfd):
    monkeypatch.setattr(http_server, "BODY_SECONDS", 0.5)
    with serving(echo) as server:
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
        connection.request("POST", "/v1/chat/completions", b"{", {**JSON, "Content-Length": "100"})
        time.sleep(0.2)
        started = time.monotonic()
    answer = connection.getresponse()
    assert time.monotonic() - started < 5
    assert answer.status == 408
    assert "did not arrive within 0.5 s" in json.loads(answer.read())["error"]["message"]
    assert capfd.readouterr().err == ""


# --------------------------------------------------------------------------------------------- errors


def fail(error):
    def generate(*args, **more):
        args[3]([300])  # one token is out already
        raise error

    return generate


def test_full_memory_is_an_error_and_the_server_goes_on(echoing, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        patch.setattr(generation, "generate", fail(torch.OutOfMemoryError("CUDA out of memory …")))
        with pytest.raises(openai.InternalServerError, match="GPU out of memory") as error:
            ask(echoing, "a")
        assert error.value.status_code == 503
        with pytest.raises(openai.APIError, match="GPU out of memory"):
            list(ask(echoing, "a", stream=True))
    assert ask(echoing, "a").choices[0].message.content == "a"
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_bug_is_an_error_for_the_client_and_a_traceback_in_the_log(echo, monkeypatch, capfd):
    errors = []

    def is_logged():  # by the server's thread, perhaps after its answer
        errors.append(capfd.readouterr().err)
        return "ZeroDivisionError: private" in "".join(errors)

    with serving(echo) as server:  # its own: uvicorn logs to the sys.stderr of when it was made
        with monkeypatch.context() as patch:
            patch.setattr(generation, "generate", fail(ZeroDivisionError("private")))
            with pytest.raises(openai.InternalServerError, match="internal server error") as error:
                ask(server, "a")
            assert error.value.type == "server_error"
            with pytest.raises(openai.APIError, match="internal server error"):
                list(ask(server, "a", stream=True))
        assert ask(server, "a").choices[0].message.content == "a"
        eventually(is_logged)


def test_what_is_printed_of_an_answer_holds_no_word_of_it(echoing, capfd):
    ask(echoing, "секрет", tools=TOOLS)
    with pytest.raises(openai.BadRequestError):
        ask(echoing, "секрет" * 1000)
    eventually(lambda: not echoing.generations)
    out, err = capfd.readouterr()
    assert "секрет" not in out + err
    first, second = out.splitlines()
    assert first.startswith("tuned      ")
    assert " prompt + 7 completion tokens, " in first
    assert first.endswith(" s, stop")
    assert second.startswith("refused    400 POST /v1/chat/completions: ")
    assert "exceed the context of 4096" in second
