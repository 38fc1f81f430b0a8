"""Requests that ask for much: what they may take of memory and time, and of the time of others."""

import concurrent.futures
import json
import socket
import time
import tracemalloc

import httpx2
import pytest

from tests.support.chat_client import USER, post
from tuner.data.call_stream import CallStream
from tuner.serving import streaming

SIZE = 480_000  # bytes, nearly the largest body


def calling(name, arguments):
    call = {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}
    return {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "a"},
        ]
    }


def padded(begin, middle, end):
    return begin + middle * ((SIZE - len(begin + end)) // len(middle)) + end


HOSTILE = {  # what takes time: to tokenize, to escape and read back, to report, to parse
    "text": {"messages": [{"role": "user", "content": "a b" * (SIZE // 3)}]},
    "references": calling("f", json.dumps({"a": "<" * SIZE})),
    "many arguments": calling("f", json.dumps({str(i): i for i in range(25_000)})),
    "name": calling("&" * (SIZE // 2), "{}"),
    "many calls": {
        "messages": [
            USER,
            {
                "role": "assistant",
                "tool_calls": [{"function": {"name": "f", "arguments": '{"a":"&&&&&&&&"}'}}] * 6000,
            },
        ]
    },
    "many results of no call": {
        "messages": [
            USER,
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": ""}}] * 4000},
            *[{"role": "tool", "name": "g", "content": ""}] * 4000,
        ]
    },
    "many faults": padded(b'{"messages": [', b"1,", b"1]}"),
    "many tools that are none": padded(b'{"messages": [], "tools": [', b"1,", b"1]}"),
    "many messages": {"messages": [USER, {"role": "assistant", "content": "b"}] * 6000},
}


def longest_wait(server, ask):
    """Return (what ask() returns, the longest time that /health took while it was running)."""
    with httpx2.Client(timeout=60) as client, concurrent.futures.ThreadPoolExecutor(1) as pool:
        client.get(f"{server.url}/health")
        answer, longest = pool.submit(ask), 0
        while not answer.done():
            started = time.perf_counter()
            client.get(f"{server.url}/health")
            longest = max(longest, time.perf_counter() - started)
            time.sleep(0.005)
    return answer.result(), longest


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_others_are_answered_while_a_large_request_is_refused(echoing, body):
    answer, longest = longest_wait(echoing, lambda: post(echoing, body))
    assert answer.status_code == 400
    assert longest < 0.5


def test_a_long_name_is_not_repeated_in_every_result_of_its_call(echoing):
    body = calling("a" * 60_000, "{}")
    body["messages"] += [{"role": "tool", "tool_call_id": "1"}] * 200
    message = post(echoing, body).json()["error"]["message"]
    assert message.startswith("at least "), "refused before 12 MB of text are written and tokenized"


def test_others_are_answered_while_a_body_arrives_byte_by_byte(echoing):
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    chunks = b"1\r\n \r\n" * 40_000 + b"2\r\n{}\r\n0\r\n\r\n"

    def send():
        with socket.create_connection(("127.0.0.1", int(echoing.url.rsplit(":", 1)[1]))) as connection:
            connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
            return connection.recv(2**16)

    answer, longest = longest_wait(echoing, send)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert longest < 0.5


def test_stop_strings_are_compared_without_building_their_beginnings():
    stops = ["a" * 4999 + letter for letter in "bcde"]
    text, held_back = "a" * 4000, ""
    tracemalloc.start()
    try:
        for _ in range(3):
            settled, held_back, stopped = streaming.split_at_stop(held_back + text, stops)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (len(held_back), stopped) == (4999, False)
    assert len(settled) == 4000
    assert peak < 10**6, "and not the 12 MB of each stop's beginnings"


@pytest.mark.parametrize("stop", ["a" * 499 + "b", "ab" * 250, "a" * 250 + "b" * 250])
def test_a_stop_string_takes_little_time_at_every_piece_of_an_answer(stop):
    started, held_back = time.process_time(), ""
    for _ in range(2000):
        _, held_back, _ = streaming.split_at_stop(held_back + "aaa", [stop] * 4)
    assert time.process_time() - started < 2


LONG_CALLS = [
    '<tool_call name="x" arguments="{"a": "' + "b" * 12_000,
    '<tool_call name="x" arguments="{"a": [' + "1," * 6000,
    '<tool_call name="x" arguments="{&quot;a&quot;: &quot;' + "&lt;" * 3000,
    "<" + " " * 12_000,
    '<tool_call name="' * 700,
]


@pytest.mark.parametrize("text", LONG_CALLS, ids=range(len(LONG_CALLS)))
def test_a_call_without_end_is_not_parsed_again_at_every_piece(text):
    started, stream = time.process_time(), CallStream()
    parts = [part for i in range(0, len(text), 3) for part in stream.add(text[i : i + 3])]
    assert "".join(parts + stream.finish()) == text
    assert time.process_time() - started < 1.5
