"""compare.py --endpoint sends results of calls back and streams: what each finds, and the verdict of it."""

import json
from pathlib import Path

import pytest

import compare
from tests.support.chat_server import Endpoint, calling, completion, events
from tests.support.rows import PROBES
from tuner.data import tool_call
from tuner.inference import endpoint_checks, endpoint_client
from tuner.inference.probes import load_all
from tuner.system.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
NAME = "get_sensitive_data"
TAG = tool_call.format_call(NAME, {})
NEEDED = dict(PROBES)
ALTERNATE = (400, {}, b'{"error": {"message": "turns must alternate user/assistant"}}')


@pytest.fixture
def ask(monkeypatch, capsys, tmp_path):
    """A function of `say` that runs compare.py on the probes: (exit code, output, report, requests)."""
    monkeypatch.delenv(endpoint_client.KEY, raising=False)
    monkeypatch.setenv("COLUMNS", "80")

    def ask(say):
        server, report = Endpoint(say), tmp_path / "report.json"
        flags = ["--endpoint", server.url, "--json", str(report), "--probes", f"{ROOT}/probes.json"]
        args = compare.parse_arguments([*flags, "--data", f"{ROOT}/probes.json"])
        try:
            files = load_all((args.probes, "--probes"), (args.data, "--data"))
            code = compare.compare_endpoint(args, *files)
        finally:
            server.close()
        bodies = [body for _, _, _, body in server.requests if body]
        return code, capsys.readouterr().out, json.loads(report.read_text(encoding="utf-8")), bodies

    return ask


def answer(body, call=calling((NAME, "{}"))):  # noqa: B008
    last = body["messages"][-1]
    return call if last["role"] == "user" and NEEDED[last["content"]] else completion("Готово.")


@pytest.mark.parametrize("form", ["parsed", "tagged"])
def test_calls_are_sent_back_with_results_and_answered(ask, form):
    call = calling((NAME, '{"a":"б"}'), (NAME, ""), content="Да.") if form == "parsed" else None
    text = f"Да.\n{tool_call.format_call(NAME, {'a': 'б'})}\n{TAG}"
    call = call or completion(text)
    call["choices"][0]["message"]["reasoning"] = None  # what vLLM sends too, and SDKs send back
    _, output, report, bodies = ask(lambda body: answer(body, call))
    assert "\nresults    4 of 4 calls given a result, and answered\n" in output
    assert report["results"] == {"sent": 4, "answered": 4, "refused": None}
    loops = [body for body in bodies if body["messages"][-1]["role"] == "tool"]
    assert [body["messages"][0]["content"] for body in loops] == [q for q, need in PROBES if need][:4]
    for body in loops:
        _, said, *results = body["messages"]
        if form == "parsed":
            assert said == call["choices"][0]["message"]
        assert (said["role"], said["content"]) == ("assistant", "Да.")
        functions = [(c["type"], c["function"]["name"]) for c in said["tool_calls"]]
        assert functions == [("function", NAME)] * 2
        assert json.loads(said["tool_calls"][0]["function"]["arguments"]) == {"a": "б"}
        ids = [c["id"] for c in said["tool_calls"]]
        assert len(set(ids)) == 2
        assert [(m["tool_call_id"], m["content"]) for m in results] == [
            (i, endpoint_checks.RESULT) for i in ids
        ]
        assert body["tools"]
        assert "stream" not in body


def test_results_that_are_refused_fail_the_endpoint_by_name(ask):
    def say(body):
        return ALTERNATE if body["messages"][-1]["role"] == "tool" else answer(body)

    code, output, report, _ = ask(say)
    assert code == 1
    assert "results    refused, so the loop of calls and results breaks (400: turns must\n" in output
    assert "verdict    the endpoint falls short: results of calls are refused\n" in output
    assert report["results"]["refused"] == "400: turns must alternate user/assistant"
    assert report["gate"]["short"] == ["results of calls are refused"]
    assert not report["gate"]["passed"]


def test_an_empty_answer_to_a_result_is_none(ask):
    replies = iter(["", "Готово.", " \n", "Готово."])

    def say(body):
        last = body["messages"][-1]["role"] == "tool"
        return completion(next(replies)) if last else answer(body)

    code, output, _, _ = ask(say)
    assert (code, "results    2 of 4 calls given a result, and answered\n" in output) == (1, True)
    assert "falls short: 2 of 4 results of calls are answered\n" in output


def test_without_a_call_no_result_is_sent(ask):
    _, output, report, bodies = ask(lambda body: completion("Здравствуйте!"))
    assert "\nresults    not tried: no question was answered by a call\n" in output
    assert report["results"] == {"sent": 0, "answered": 0, "refused": None}
    assert all(len(body["messages"]) == 1 for body in bodies)


# ------------------------------------------------------------------------------------------ streaming


def test_streamed_answers_are_compared_with_whole_ones(ask):
    code, output, report, bodies = ask(answer)
    assert code == 0
    assert "\nstreamed   6 of 6 probes answered as when whole\n" in output
    assert report["streamed"] == {"asked": 6, "other_calls": [], "other_text": [], "refused": None}
    streamed = [body for body in bodies if body.get("stream")]
    assert [body["messages"][0]["content"] for body in streamed] == [prompt for prompt, _ in PROBES]
    whole = next(body for body in bodies if body["messages"] == streamed[0]["messages"])
    assert {**whole, "stream": True} == streamed[0]


@pytest.mark.parametrize(
    ("streamed", "code", "says"),
    [
        (calling((NAME, '{"a": 1}')), 1, "other calls"),
        (completion(TAG), 1, "other calls"),  # a parser that works for whole answers alone
        (completion(""), 1, "other calls"),
        (calling((NAME, "{}"), content="Да."), 0, "other text"),
    ],
)
def test_a_stream_with_another_answer_is_named(ask, streamed, code, says):
    first = next(prompt for prompt, need in PROBES if need)

    def say(body):
        mine = body.get("stream") and body["messages"][0]["content"] == first
        return streamed if mine else answer(body)

    ended, output, _, _ = ask(say)
    assert ended == code
    assert "\nstreamed   5 of 6 probes answered as when whole\n" in output
    assert f"\n           {says}: {ROOT}/probes.json:1\n" in output.replace("\n           /", " /")
    assert ("1 of 6 probes have other calls when streamed" in output) == (code == 1)


def test_an_answer_that_another_batch_changes_is_asked_for_once_more(ask):
    times = {}

    def say(body):
        prompt = body["messages"][0]["content"]
        if NEEDED[prompt] or body["messages"][-1]["role"] == "tool":
            return answer(body)
        times[prompt] = times.get(prompt, 0) + 1
        return completion("В пачке." if times[prompt] <= 2 else "Один.")  # as a probe, and as a row

    code, output, _, _ = ask(say)
    assert code == 0
    assert "\nstreamed   6 of 6 probes answered as when whole\n" in output


def test_an_endpoint_that_does_not_stream_says_so(ask):
    refused = (400, {}, b'{"error": {"message": "no streaming"}}')
    code, output, report, _ = ask(lambda body: refused if body.get("stream") else answer(body))
    assert code == 0
    assert "\nstreamed   refused (400: no streaming)\n" in output
    assert report["streamed"]["refused"] == "400: no streaming"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            b'data: {"error": {"message": "out of memory"}}\n\n',
            "the stream ends in an error ({'message': 'out",
        ),
        (b"data: 5\n\n", "the stream is not one of chat completion chunks; check that"),
        (
            b'data: {"choices": [{"delta": {"tool_calls": [{}]}}]}\n\n',
            "the stream is not one of chat completion",
        ),
        (b"data: {\n\n", "does not answer in JSON (text/event-stream); check that"),
        (b"data: \xff\n\n", "does not answer in JSON (text/event-stream); check that"),
    ],
)
def test_a_stream_that_cannot_be_read_is_one_line(ask, content, says):
    broken = (200, {"Content-Type": "text/event-stream"}, content)
    with pytest.raises(UserError) as error:
        ask(lambda body: broken if body.get("stream") else answer(body))
    assert says in str(error.value)
    assert str(error.value).isprintable()


def test_a_stream_is_put_together_from_its_pieces():
    whole = calling(("f", '{"a": "\u2028"}'), ("g", ""), content="a\u2028b\n")
    chunks = [
        json.loads(line.removeprefix("data: "))
        for line in events(whole).decode().split("\n")
        if line.startswith("data: {")
    ]
    joined = endpoint_checks.join_chunks(chunks)["choices"][0]
    assert joined == {key: whole["choices"][0][key] for key in ("message", "finish_reason")}
