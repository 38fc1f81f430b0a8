"""The server: OpenAI's own client against a real one, what it refuses, hang-ups and signals."""

import asyncio
import concurrent.futures
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx2
import openai
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import serve
from tests.conftest import write_tiny_adapter
from tests.support.echo_server import CALL, END, ORDER, eventually, serving
from tuner.data.tool_call import Call
from tuner.inference import generation
from tuner.serving import chat_completions, http_server
from tuner.system.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TOOLS = [{"type": "function", "function": {"name": "get_sensitive_data", "parameters": {"type": "object"}}}]
JSON = {"Content-Type": "application/json"}


# ------------------------------------------------------------------------------------------ the server


@pytest.fixture(scope="module")
def plain(tiny_text_model):
    """(model, tokenizer) of random weights."""
    return generation.load_model(tiny_text_model, "tiny", None)


@pytest.fixture(scope="module")
def echoing(echo):
    with serving(echo) as server:
        yield server


def client_of(server, key="none"):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60)


def ask(server, text, **more):
    messages = [{"role": "user", "content": text}]
    return client_of(server).chat.completions.create(**{"model": "tuned", "messages": messages, **more})


def post(server, body, **headers):
    """Returns the answer to a POST of JSON, or of bytes as they are."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx2.post(
        f"{server.url}/v1/chat/completions", content=content, headers={**JSON, **headers}, timeout=60
    )


def readme():
    """Returns the program that README.md has for a client, and what it prints."""
    blocks = (ROOT / "README.md").read_text(encoding="utf-8").split("## Use it")[1].split("```")
    assert blocks[1].startswith("python\n")
    return blocks[1].removeprefix("python\n"), blocks[3].lstrip("\n")


def heard(stream):
    """Returns (content, [(name, arguments)], finish reason, usage) of a stream, as clients join it."""
    content, calls, reason, usage, role = "", {}, None, None, []
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert reason is None, "nothing comes after the reason"
            delta, reason = choice.delta, choice.finish_reason
            role += [delta.role] if delta.role else []
            content += delta.content or ""
            for call in delta.tool_calls or []:
                if call.id:
                    assert call.type == "function"
                    calls[call.index] = [call.function.name, ""]
                calls[call.index][1] += call.function.arguments or ""
    assert role == ["assistant"]
    assert list(calls) == list(range(len(calls)))
    return content, [(name, json.loads(text)) for name, text in calls.values()], reason, usage


# -------------------------------------------------------------------------------------------- answers

SENSITIVE = ("get_sensitive_data", {})
ANSWERS = [
    ("Здравствуйте! 5 < 6.", "Здравствуйте! 5 < 6.", []),
    ("два\n\nабзаца 😀 и 日本", "два\n\nабзаца 😀 и 日本", []),  # in bytes, each a token of its own
    (CALL, None, [SENSITIVE]),
    (f"Сейчас. {CALL} Готово", "Сейчас.  Готово", [SENSITIVE]),
    (CALL + ORDER, None, [SENSITIVE, ("get_order", {"номер": 5, "note": 'a "b" <c>'})]),
    (f"{CALL}\n{CALL}", None, [SENSITIVE, SENSITIVE]),
    ('<tool_call nome="x"/>', '<tool_call nome="x"/>', []),
    (CALL[:-2], CALL[:-2], []),
    ("<", "<", []),
]


@pytest.mark.parametrize(("text", "content", "calls"), ANSWERS)
def test_answers_whole_and_streamed_with_calls_and_without(echoing, text, content, calls):
    answer = ask(echoing, text, tools=TOOLS)
    message, reason = answer.choices[0].message, answer.choices[0].finish_reason
    assert message.content == content
    made = [(c.function.name, json.loads(c.function.arguments)) for c in message.tool_calls or []]
    assert made == calls
    assert len({call.id for call in message.tool_calls or []}) == len(calls)
    assert reason == ("tool_calls" if calls else "stop")
    said, streamed, reason_too, usage = heard(
        ask(echoing, text, tools=TOOLS, stream=True, stream_options={"include_usage": True})
    )
    assert (said.strip(), streamed, reason_too) == ((content or "").strip(), calls, reason)
    assert usage == answer.usage


@pytest.mark.parametrize("more", [{}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"}])
def test_without_tools_the_text_is_passed_on_as_it_was_written(echoing, more):
    text = f"Сейчас. {CALL}"
    choice = ask(echoing, text, **more).choices[0]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (text, None, "stop")
    stream = list(ask(echoing, text, stream=True, **more))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text
    assert len(stream) > len(CALL), "a token is passed on as soon as it is there"
    assert stream[-1].usage is None


def test_the_readmes_client_prints_what_it_says(echo, echoing, monkeypatch, capsys):
    monkeypatch.setattr(echo[0], "says", CALL)
    program, prints = readme()
    assert "http://127.0.0.1:8000/v1" in program
    exec(program.replace("http://127.0.0.1:8000", echoing.url), {})
    assert capsys.readouterr().out.endswith(f" s, stop\n{prints}")


def test_an_answer_of_nothing(echo, echoing, monkeypatch):
    monkeypatch.setattr(generation, "generate", lambda *args, **more: args[3]([END]))
    assert ask(echoing, "a").choices[0].message.content == ""
    content, calls, reason, _ = heard(ask(echoing, "a", stream=True))
    assert (content, calls, reason) == ("", [], "stop")


def run_parts(pieces, tools=TOOLS):
    """Returns what parts() yields of an answer that is written in these pieces."""

    async def collect():
        queue = asyncio.Queue()
        for piece in [*pieces, chat_completions.Finish("stop", 1)]:
            queue.put_nowait(piece)
        asked = chat_completions.ChatCompletionRequest(messages=[], tools=tools)
        job = chat_completions.Generation("tuned", asked, [], 1, queue, threading.Event())
        return [part async for part in chat_completions.answer_parts(job)]

    return asyncio.run(collect())


@pytest.mark.parametrize(("text", "content", "calls"), ANSWERS)
def test_pieces_cut_at_any_place_say_and_call_the_same(text, content, calls):
    for place in range(1, len(text)):
        *settled, end = run_parts([text[:place], text[place:]])
        assert "".join(p for p in settled if isinstance(p, str)).strip() == (content or "").strip()
        assert [(p.name, p.arguments) for p in settled if isinstance(p, Call)] == calls
        assert "" not in settled
        assert end == ("stop", 1)


def test_text_is_held_back_only_where_a_call_may_begin():
    assert run_parts(["5 <", " 6 <tool", "box>"])[:-1] == ["5 ", "< 6 ", "<toolbox>"]


# -------------------------------------------------------------------------------- prompts and generation

TALK = [
    {"role": "developer", "content": "Коротко."},
    {"role": "user", "content": [{"type": "text", "text": "Баланс?"}]},
    {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "get_sensitive_data", "arguments": "{}"}}
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "<100> рублей"},
    {"role": "assistant", "content": "Сто."},
    {"role": "user", "content": "Точно?"},
]
TALK_TEXT = (
    "<bos><start_of_turn>user\nКоротко.\n\nБаланс?<end_of_turn>\n"
    f"<start_of_turn>model\n{CALL}<end_of_turn>\n"
    '<start_of_turn>user\n<tool_result name="get_sensitive_data">&lt;100&gt; рублей</tool_result>'
    "<end_of_turn>\n<start_of_turn>model\nСто.<end_of_turn>\n"
    "<start_of_turn>user\nТочно?<end_of_turn>\n<start_of_turn>model\n"
)


def test_the_prompt_is_what_the_template_gives_of_calls_and_results(plain, monkeypatch):
    _, tokenizer = plain
    prompts, generate = [], generation.generate

    def spy(model, tokenizer, asked, *more, **settings):
        prompts.extend(asked)
        return generate(model, tokenizer, asked, *more, **settings)

    monkeypatch.setattr(generation, "generate", spy)
    with serving(plain) as server:
        answer = client_of(server).chat.completions.create(model="tuned", messages=TALK, max_tokens=3)
        client_of(server).chat.completions.create(model="tuned", messages=TALK[:4], max_tokens=3)
    wanted = tokenizer(TALK_TEXT, add_special_tokens=False)["input_ids"]
    assert prompts[0] == wanted
    assert prompts[0].count(2) == 1, "one <bos>"
    assert tokenizer.decode(prompts[1]).endswith("</tool_result><end_of_turn>\n<start_of_turn>model\n")
    assert answer.usage.prompt_tokens == len(wanted)
    assert answer.usage.completion_tokens == 3
    assert answer.usage.total_tokens == len(wanted) + 3
    assert answer.choices[0].finish_reason == "length"


def test_the_true_generation_is_compares_word_for_word_whole_and_streamed(plain):
    prompts = ["Привет", "Какой у меня остаток на счёте?", "a" * 60]
    wanted = generation.answer_all(*plain, [[{"role": "user", "content": prompt}] for prompt in prompts])
    with serving(plain) as server:
        for prompt, answer in zip(prompts, wanted, strict=True):
            given = ask(server, prompt, max_tokens=generation.MAX_NEW_TOKENS)
            assert given.choices[0].message.content == answer.text
            content, _, reason, _ = heard(
                ask(server, prompt, max_completion_tokens=generation.MAX_NEW_TOKENS, stream=True)
            )
            assert (content, reason) == (answer.text, "length")


def test_the_end_token_ends_an_answer_and_is_not_in_it(plain):
    model, tokenizer = plain
    whole = generation.answer_all(model, tokenizer, [[{"role": "user", "content": "Привет"}]])[0]
    before, model.generation_config.eos_token_id = model.generation_config.eos_token_id, [1, whole.ids[5]]
    try:
        with serving(plain) as server:
            answer = ask(server, "Привет")
    finally:
        model.generation_config.eos_token_id = before
    place = whole.ids.index(whole.ids[5])
    assert answer.choices[0].message.content == tokenizer.decode(whole.ids[:place])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == place + 1


def sampled(model, ids, count, temperature, top_p, seed):
    """Draws tokens by hand: from the fewest likeliest tokens that have top_p together, renormalised."""
    torch.manual_seed(seed)
    new = []
    with torch.inference_mode():
        while len(new) < count:
            probabilities = (model(torch.tensor([ids + new])).logits[0, -1].float() / temperature).softmax(-1)
            ordered, places = probabilities.sort()
            ordered[ordered.cumsum(-1) <= 1 - top_p] = 0
            kept = torch.zeros_like(probabilities).scatter(-1, places, ordered)
            new.append(torch.multinomial(kept / kept.sum(), 1).item())
    return new


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.4, 1.0), (1.5, 0.3)])
def test_temperature_top_p_and_seed_draw_what_is_drawn_by_hand(plain, temperature, top_p):
    model, tokenizer = plain
    ids = generation.prompt_ids(tokenizer, [{"role": "user", "content": "Привет"}])
    more = {"temperature": temperature, "max_tokens": 12, **({"top_p": top_p} if top_p < 1 else {})}
    with serving(plain) as server:
        one, other = (ask(server, "Привет", seed=seed, **more).choices[0].message.content for seed in (1, 2))
        again = ask(server, "Привет", seed=1, **more).choices[0].message.content
        free = {ask(server, "Привет", **more).choices[0].message.content for _ in range(3)}
        greedy = {ask(server, "Привет", temperature=0, max_tokens=12).choices[0].message.content}
        greedy |= {ask(server, "Привет", seed=s, max_tokens=12).choices[0].message.content for s in (1, 2)}
    assert one == tokenizer.decode(sampled(model, ids, 12, temperature, top_p, 1))
    assert other == tokenizer.decode(sampled(model, ids, 12, temperature, top_p, 2))
    assert one == again != other
    assert len(free) == 3
    assert len(greedy) == 1


@pytest.mark.parametrize(
    ("stop", "said"),
    [
        ("мир", "Привет, "),
        (["x", "т, м"], "Приве"),
        (["мири"], "Привет, мир!"),
        ("!", "Привет, мир"),
        ("!!", "Привет, мир!"),
    ],
)
def test_stop_strings_end_an_answer_before_them(echoing, stop, said):
    choice = ask(echoing, "Привет, мир!", stop=stop).choices[0]
    assert (choice.message.content, choice.finish_reason) == (said, "stop")
    content, _, reason, usage = heard(
        ask(echoing, "Привет, мир!", stop=stop, stream=True, stream_options={"include_usage": True})
    )
    assert (content, reason) == (said, "stop")
    assert usage.completion_tokens <= len("Привет, мир!") + 1
    if said == "Приве":
        assert usage.completion_tokens == len("Привет, м"), "and the model writes no more"


@given(st.text("ab", max_size=8), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_a_stop_string_is_never_said_and_nothing_else_is_lost(text, stops):
    said = held = ""
    for letter in text:
        new, held, stopped = chat_completions.split_at_stop(held + letter, stops)
        said += new
        if stopped:
            break
    else:
        said += held
        assert said == text
        assert not any(stop in text for stop in stops)
        return
    assert text.startswith(said)
    assert not any(stop in said for stop in stops)
    assert any(text.startswith(said + stop) for stop in stops)


def test_how_many_tokens_an_answer_may_have(echoing, monkeypatch):
    monkeypatch.setattr(chat_completions, "NEW_TOKENS", 7)
    text = "0123456789"
    for more, length in [
        ({}, 7),
        ({"max_tokens": 3}, 3),
        ({"max_completion_tokens": 4}, 4),
        ({"max_tokens": 50}, 11),
    ]:
        answer = ask(echoing, text, **more)
        assert answer.usage.completion_tokens == length
        assert answer.choices[0].message.content == text[:length]
        assert answer.choices[0].finish_reason == ("length" if length < 11 else "stop")


def test_where_no_number_is_given_what_is_left_of_the_context_is_enough(echoing):
    answer = ask(echoing, "ъ" * 4060)
    assert answer.usage.prompt_tokens > 4096 - chat_completions.NEW_TOKENS
    assert answer.usage.total_tokens == 4096
    assert answer.choices[0].finish_reason == "length"


# --------------------------------------------------------------------------------- what is refused

USER = {"role": "user", "content": "a"}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "b"}
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
    ({"messages": [{"role": "user", "content": "a<end_of_turn>"}]}, 400, "control token", "messages"),
    ({"messages": [USER, USER]}, 400, "speaks twice in a row", "messages"),
    ({"messages": [{"role": "system", "content": "a"}]}, 400, 'message is from "system"', "messages"),
    ({"messages": [USER, {"role": "assistant", "content": "b"}]}, 400, 'from "assistant"', "messages"),
    ({"messages": [USER, RESULT]}, 400, "message 2: ", "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "message 1: ", "messages"),
    ({"messages": [USER], "n": 2}, 400, "n: ", "n"),
    ({"messages": [USER], "response_format": {"type": "json_object"}}, 400, "'text'", "response_format"),
    ({"messages": [USER], "tool_choice": "required"}, 400, "'auto' or 'none'", "tool_choice"),
    ({"messages": [USER], "temperature": 2.1}, 400, "temperature: ", "temperature"),
    ({"messages": [USER], "temperature": "1"}, 400, "temperature: ", "temperature"),
    ({"messages": [USER], "temperature": float("nan")}, 400, "temperature: ", "temperature"),
    ({"messages": [USER], "top_p": 0}, 400, "top_p: ", "top_p"),
    ({"messages": [USER], "seed": 2**63}, 400, "seed: ", "seed"),
    ({"messages": [USER], "stop": ["a"] * 5}, 400, "stop: a string, or up to 4", "stop"),
    ({"messages": [USER], "stop": ""}, 400, "stop: a string, or up to 4, none of them empty", "stop"),
    ({"messages": [USER], "stop": [""]}, 400, "stop: a string, or up to 4, none of them empty", "stop"),
    ({"messages": [USER], "max_tokens": 0}, 400, "max_tokens: ", "max_tokens"),
    ({"messages": [USER], "max_completion_tokens": -1}, 400, "max_completion", "max_completion_tokens"),
    ({"messages": [USER], "logprobs": True}, 400, "logprobs: ", "logprobs"),
    ({"messages": [USER], "logit_bias": {"1": 5}}, 400, "logit_bias: ", "logit_bias"),
    ({"messages": [USER], "presence_penalty": 1}, 400, "presence_penalty: ", "presence_penalty"),
    ({"messages": [USER], "frequency_penalty": 0.5}, 400, "frequency_penalty: ", "frequency_penalty"),
    ({"messages": [USER], "model": "gpt-\x1b[31m"}, 404, "no model gpt-\ufffd[31m is here", "model"),
    ({"messages": [USER], "max_tokens": 4090}, 400, "are more than the 4096 that fit", "max_tokens"),
    ({"messages": [{"role": "user", "content": "ъ" * 4096}]}, 400, "more than the 4096 that fit", "messages"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "says", "param"), BAD, ids=range(len(BAD)))
def test_what_a_request_has_wrong_is_said_in_openais_form(echoing, capfd, body, status, says, param):
    answer = post(echoing, body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert says in error["message"]
    assert error["message"].isprintable()
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert "code" in error
    out, err = capfd.readouterr()
    assert (out, err) == (f"refused    {status} POST /v1/chat/completions\n", "")


def test_the_clients_own_errors(echoing):
    with pytest.raises(openai.NotFoundError, match="no model gpt-4 is here, but tuned") as error:
        ask(echoing, "a", model="gpt-4")
    assert (error.value.code, error.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as error:
        ask(echoing, "a", max_tokens=5000, stream=True)
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
    assert "refused    404 GET /v1/no\ufffd[31m\n" in out


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


# ---------------------------------------------------------------------------------- who may ask


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


# ------------------------------------------------------------------------------- many, and hang-ups


def test_fifty_clients_at_once_get_each_their_own(echoing, monkeypatch):
    monkeypatch.setattr(http_server, "QUEUE", 50)
    texts = [f"Вопрос номер {number} {'я' * (number % 7)}." for number in range(50)]

    def one(text):
        if len(text) % 2:
            return heard(ask(echoing, text, stream=True))[0]
        return ask(echoing, text).choices[0].message.content

    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        assert list(pool.map(one, texts)) == texts


def test_more_than_may_wait_are_told_to_come_again(echo, monkeypatch):
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
        eventually(lambda: not server.jobs)
        # OpenAI's client comes again by itself.
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=9)
        answers = pool.map(
            lambda n: client.chat.completions.create(model="tuned", messages=[USER], max_tokens=1), range(5)
        )
        assert {answer.choices[0].message.content for answer in answers} == {"a"}


@pytest.mark.parametrize("stream", [True, False])
def test_the_work_of_who_hangs_up_is_dropped(echo, stream, monkeypatch, capfd):
    monkeypatch.setattr(echo[0], "delay", 0.02)
    text = "я" * 400  # eight seconds

    body = json.dumps({"messages": [{"role": "user", "content": text}], "stream": stream})

    def begin(server, jobs):
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
        connection.request("POST", "/v1/chat/completions", body, JSON)
        eventually(lambda: len(server.jobs) == jobs)
        return connection

    with serving(echo) as server:
        running = begin(server, 1)
        waiting = begin(server, 2)
        waiting.sock.close()
        eventually(lambda: len(server.jobs) == 1, 2)  # gone at once, and never begun
        running.sock.close()
        started = time.monotonic()
        assert ask(server, "a").choices[0].message.content == "a"
        assert time.monotonic() - started < 4
        eventually(lambda: not server.jobs)
    out = capfd.readouterr().out
    lines = [line for line in out.splitlines() if "tokens" in line]
    assert len(lines) == 2, "one broken off, one answered"
    assert lines[0].endswith("hung up")
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
    assert "did not come within 0.5 s" in json.loads(answer.read())["error"]["message"]
    assert capfd.readouterr().err == ""


# ------------------------------------------------------------------------------------------- troubles


def fail(error):
    def generate(*args, **more):
        args[3]([300])  # one token is out already
        raise error

    return generate


def test_full_memory_is_told_and_the_server_goes_on(echoing, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        patch.setattr(generation, "generate", fail(torch.OutOfMemoryError("CUDA out of memory …")))
        with pytest.raises(openai.InternalServerError, match="the GPU's memory is full") as error:
            ask(echoing, "a")
        assert error.value.status_code == 503
        with pytest.raises(openai.APIError, match="the GPU's memory is full"):
            list(ask(echoing, "a", stream=True))
    assert ask(echoing, "a").choices[0].message.content == "a"
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_bug_is_an_error_for_the_client_and_a_traceback_in_the_log(echoing, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        patch.setattr(generation, "generate", fail(ZeroDivisionError("private")))
        with pytest.raises(openai.InternalServerError, match="an error of the server") as error:
            ask(echoing, "a")
        assert error.value.type == "server_error"
        with pytest.raises(openai.APIError, match="an error of the server"):
            list(ask(echoing, "a", stream=True))
    assert ask(echoing, "a").choices[0].message.content == "a"
    assert "ZeroDivisionError: private" in capfd.readouterr().err


def test_what_is_printed_of_an_answer_holds_no_word_of_it(echoing, capfd):
    ask(echoing, "секрет", tools=TOOLS)
    with pytest.raises(openai.BadRequestError):
        ask(echoing, "секрет<bos>")
    eventually(lambda: not echoing.jobs)
    out, err = capfd.readouterr()
    assert "секрет" not in out + err
    first, second = out.splitlines()
    assert first.startswith("tuned      ")
    assert " + 7 tokens, " in first
    assert first.endswith(" s, stop")
    assert second == "refused    400 POST /v1/chat/completions"


# --------------------------------------------------------------------------------- the command line


def arguments(*given):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["serve.py", *given])
        return serve.parse_arguments()


def test_flags_and_their_defaults(capsys):
    plain = {
        "model": "gemma-3-4b-it-merged",
        "adapter": None,
        "bits": None,
        "host": "127.0.0.1",
        "port": 8000,
    }
    assert vars(arguments()) == plain
    given = ["--adapter", "a", "--bits", "8", "--host", "::1", "--port", "0"]
    assert vars(arguments(*given)) == {**plain, "adapter": "a", "bits": 8, "host": "::1", "port": 0}
    assert arguments("--model", "m").model == "m"
    for wrong in (["--port", "x"], ["--port", "65536"], ["--bits", "3"], ["--adapter", "a", "--model", "b"]):
        with pytest.raises(SystemExit) as left:
            arguments(*wrong)
        assert left.value.code == 2
        assert len(capsys.readouterr().err.splitlines()[-1]) < 120


def test_where_it_listens(monkeypatch):
    with http_server.listen("127.0.0.1", 0, "") as first:
        port = first.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"port {port} of 127.0.0.1 .* in use\); name another port with --port"
        ):
            http_server.listen("127.0.0.1", port, "")
    for host in ("192.0.2.1", "nowhere.invalid", "a" * 70):
        with pytest.raises(UserError, match=r"cannot be listened on \(.*\); name an address .* with --host"):
            http_server.listen(host, 0, "word")
    for host in ("0.0.0.0", ""):
        with pytest.raises(UserError, match="lets others in; set SERVE_API_KEY"):
            http_server.listen(host, 0, "")
        with http_server.listen(host, 0, "word") as listening:
            assert listening.getsockname()[0] == "0.0.0.0"
    with http_server.listen("localhost", 0, "") as listening:
        assert listening.getsockname()[0] == "127.0.0.1"


def loaded(**more):
    return serve.load(SimpleNamespace(**{"model": None, "adapter": None, "bits": None, **more}))


@pytest.fixture(scope="module")
def adapter(tiny_text_model, tmp_path_factory):
    return str(write_tiny_adapter(tmp_path_factory.mktemp("adapter") / "qlora_output", tiny_text_model))


def test_what_is_no_merged_model_is_said_in_one_line(tmp_path, tiny_text_model, adapter):
    with pytest.raises(UserError, match=r"none is not there; make it: python merge.py, or serve the adapter"):
        loaded(model="none")
    with pytest.raises(UserError, match=r"is an adapter; .* python serve.py --adapter "):
        loaded(model=adapter)
    (tmp_path / "config.json").write_bytes(Path(tiny_text_model, "config.json").read_bytes())
    with pytest.raises(UserError, match=r"is no complete model \(.* is missing\)"):
        loaded(model=tmp_path)
    with pytest.raises(UserError, match="none is not there; train an adapter first"):
        loaded(adapter="none")


def test_the_folders_name_is_the_models_and_bits_quantise_it(tiny_text_model, adapter):
    from bitsandbytes.nn import Linear4bit

    for more in ({"model": f"{tiny_text_model}/"}, {"adapter": adapter}):
        for bits in (None, 4):
            model, _, names = loaded(bits=bits, **more)
            assert any(isinstance(module, Linear4bit) for module in model.modules()) == (bits == 4)
            assert not model.training
            assert names == (["tuned", "base"] if "adapter" in more else [Path(tiny_text_model).name])


@contextlib.contextmanager
def command(*given, env=None):
    """Starts serve.py as a user does; gives the process once it answers, and its lines."""
    process = subprocess.Popen(
        [sys.executable, "-u", ROOT / "serve.py", "--port", "0", *given],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **(env or {})},
    )
    try:
        lines = [process.stdout.readline() for _ in range(4)]
        url = lines[2].split()[1].removesuffix("/v1,") if lines[2] else None
        yield process, SimpleNamespace(url=url, lines=lines)
    finally:
        process.kill()
        process.wait()


def test_base_and_adapter_answer_as_compare_has_them_answer(adapter, tiny_text_model):
    asked = [{"role": "user", "content": "Привет"}]
    wanted = {"tuned": generation.answer_all(*generation.load_tuned(adapter, None)[:2], [asked])[0].text}
    wanted["base"] = generation.answer_all(*generation.load_model(tiny_text_model, "tiny", None), [asked])[
        0
    ].text
    with command("--adapter", adapter) as (_, server):
        assert "loading " in server.lines[0]
        assert server.lines[1] == f"models     tuned, base: {adapter}, unquantised, on the CPU\n"
        assert server.lines[2].endswith("/v1, without a key\n")
        assert f"{server.url}/ in a browser" in server.lines[3]
        client = client_of(server)
        assert [model.id for model in client.models.list().data] == ["tuned", "base"]
        for name in ("tuned", "base", "tuned"):  # the adapter is on again after the base
            answer = client.chat.completions.create(model=name, messages=asked, max_tokens=80)
            assert (answer.model, answer.choices[0].message.content) == (name, wanted[name])
        unnamed = post(server, {"messages": asked, "max_tokens": 80}).json()
        assert unnamed["choices"][0]["message"]["content"] == wanted["tuned"]
    assert wanted["tuned"] != wanted["base"]


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_during_requests_ends_it_cleanly(tiny_text_model, name, code):
    with command("--model", tiny_text_model, env={"SERVE_API_KEY": "word"}) as (process, server):
        assert server.lines[2].endswith("/v1, with the key in SERVE_API_KEY\n")

        def one(stream):
            more = {"model": Path(tiny_text_model).name, "messages": [USER], "max_tokens": 4000}
            try:
                answer = client_of(server, "word").chat.completions.create(stream=stream, **more)
                return list(answer) if stream else answer
            except openai.APIError as error:
                return error.message

        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            answers = [pool.submit(one, stream) for stream in (True, False, True)]
            time.sleep(2)
            assert not any(answer.done() for answer in answers)
            process.send_signal(getattr(signal, name))
            started = time.monotonic()
            for answer in answers:
                assert "the server is stopping" in answer.result()
        assert process.wait(20) == code
        assert time.monotonic() - started < 10
        out, err = process.stdout.read(), process.stderr.read()
        assert len(err.strip().splitlines()) == 1
        assert err.strip() == "stopped"
        assert "word" not in out + err


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_it_heeds_a_signal_as_soon_as_it_says_that_it_is_there(tiny_text_model, name, code):
    with command("--model", tiny_text_model) as (process, _):
        process.send_signal(getattr(signal, name))
        assert process.wait(20) == code
        assert process.stderr.read() == "\nstopped\n"


def test_what_a_user_can_mend_is_one_line_and_exit_1(tmp_path):
    def run(*given, env=None):
        command = [sys.executable, ROOT / "serve.py", *given]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
        return result.returncode, result.stderr

    code, says = run("--port", "0")
    assert code == 1
    assert says.startswith("gemma-3-4b-it-merged is not there; make it: python merge.py")
    assert says.count("\n") == 1
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, says = run("--port", str(taken.getsockname()[1]))
    assert (code, says.count("\n")) == (1, 1)
    assert "--port" in says
    code, says = run("--host", "0.0.0.0", "--port", "0")
    assert (code, says.count("\n")) == (1, 1)
    code, says = run("--port", "0", env={**os.environ, "SERVE_API_KEY": "слово"})
    assert (code, says) == (
        1,
        "SERVE_API_KEY holds what no header can carry; take Latin letters and digits\n",
    )
