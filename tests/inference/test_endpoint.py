"""compare.py --endpoint: a served model is asked, judged as any other, and every failure is one line."""

import gzip
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import compare
from tests.support.chat_server import Endpoint, calling, completion
from tests.support.rows import GOOD, PROBES, TOOLS, USER, call, copy_questions, row
from tests.support.scripts import run_main
from tuner.data import chat_rows, tool_call
from tuner.inference import endpoint, endpoint_client, judging
from tuner.inference.probes import expected_answer, load_all
from tuner.system.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
NAME = "get_sensitive_data"
TAG = tool_call.format_call(NAME, {})
ROWS = [
    (row["messages"][:-1], row["messages"][-1]["content"])
    for _, row in chat_rows.read_rows(ROOT / "heldout.json")
]
NEEDED = [need for _, need in PROBES] + [answer == TAG for _, answer in ROWS]


def needs(body):
    """Whether a question needs the call; which one it is, is known by its text."""
    asked = body["messages"][-1]["content"]
    return dict(PROBES).get(asked) or ([{"role": "user", "content": asked}], TAG) in ROWS


def like_vllm(body):
    return calling((NAME, "{}")) if needs(body) else completion("Здравствуйте!")


def like_llama_cpp(body):
    return completion(TAG if needs(body) else "Здравствуйте!")


@pytest.fixture
def serve():
    servers = []

    def start(say=like_vllm, **more):
        servers.append(Endpoint(say, **more))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv(endpoint_client.KEY, raising=False)


def run(url, *arguments):
    files = ["--probes", f"{ROOT}/probes.json", "--data", f"{ROOT}/heldout.json"]
    args = compare.parse_arguments(["--endpoint", url, *files, *arguments])
    return compare.compare_endpoint(args, *load_all((args.probes, "--probes"), (args.data, "--data")))


def command(*arguments, folder, **environment):
    copy_questions(folder)
    return subprocess.run(
        [sys.executable, ROOT / "compare.py", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


# ------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(("say", "parsed", "tagged"), [(like_vllm, 44, 0), (like_llama_cpp, 0, 44)])
def test_calls_count_parsed_or_as_text(serve, tmp_path, monkeypatch, capsys, say, parsed, tagged):
    assert (len(NEEDED), sum(NEEDED)) == (86, 44)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    copy_questions(tmp_path)
    server = serve(say)
    assert run(server.url + "/", "--data", "heldout.json", "--json", "report.json") == 0
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines()[:-1])) <= 80
    assert f"endpoint {server.url}: 6 probes, 80 rows\nmodel tuned (the first of 2 listed); " in output
    assert f"\ncalls      {parsed} parsed tool_calls, {tagged} unparsed tags in text\n" in output
    verdict = "verdict    the endpoint passes 6 of 6 probes, F1 1.00 of 40 calls, 0 of 40 false calls\n"
    assert output.endswith(verdict)
    prompt, expected = f"  prompt    {PROBES[0][0]}\n", f"  expected  {NAME}()\n"
    assert f"probe 1    pass\n{prompt}{expected}  endpoint  {TAG}\n" in output
    rate = r"40 of 40: 1\.00 \(0\.91–1\.00\)\n"
    assert re.search(rf"\nheldout\.json +endpoint\ndecision +precision +{rate} +recall +{rate}", output)
    assert not re.search("base|tools? |seen in training|arguments  |unparsed, ", output)
    report = json.loads(Path("report.json").read_text(encoding="utf-8"))
    assert report["calls"] == {"parsed": parsed, "text": tagged}
    assert (report["passed"], report["model"], report["tools_refused"]) == (6, "tuned", None)
    assert report["rows"]["endpoint"]["right"]["f1"]["value"] == 1
    assert report["rows"]["failing"] == []
    assert report["probes"][0]["endpoint"] == TAG


def test_every_question_is_asked_as_it_is_judged_locally(serve):
    server = serve()
    run(server.url)
    assert server.requests[0][:2] == ("GET", "/v1/models")
    bodies = [body for _, path, _, body in server.requests if path == "/v1/chat/completions"][:86]
    function = {"name": NAME, "parameters": {"type": "object", "properties": {}}}
    settings = {"model": "tuned", "temperature": 0, "max_tokens": 80}
    settings["tools"] = [{"type": "function", "function": function}]
    assert all({**settings, "messages": body["messages"]} == body for body in bodies)
    asked = [[{"role": "user", "content": prompt}] for prompt, _ in PROBES] + [m for m, _ in ROWS]
    assert sorted(str(body["messages"]) for body in bodies) == sorted(map(str, asked))
    assert not any("authorization" in headers for _, _, headers, _ in server.requests)


def test_a_model_can_be_named_and_then_none_is_listed(serve, capsys):
    server = serve()
    assert run(server.url, "--model", "base") == 0
    assert "\nmodel base; " in capsys.readouterr().out
    assert {path for _, path, _, _ in server.requests} == {"/v1/chat/completions"}
    assert {body["model"] for _, _, _, body in server.requests} == {"base"}
    assert run(server.url, "--model", os.fsdecode(b"\x1b\xff")) == 0  # what a shell may hand over
    assert "\nmodel \ufffd?; " in capsys.readouterr().out


def test_four_are_asked_at_once_and_late_answers_change_nothing(serve, capsys):
    def slow(body):
        time.sleep(0.05 * (len(body["messages"][-1]["content"]) % 3))
        return like_vllm(body)

    quick, late = serve(), serve(slow)
    assert (run(quick.url), run(late.url)) == (0, 0)
    assert late.most == endpoint.CONCURRENT_REQUESTS == 4
    first, second = (
        re.sub(r"time .*|endpoint http.*", "", output)
        for output in re.split("(?=endpoint http)", capsys.readouterr().out)[1:]
    )
    assert first == second


def test_wrong_answers_fail_with_their_reasons(serve, tmp_path, capsys):
    odd = "Ваш \x1b[31mбаланс \ud83d"
    wrong = [  # an answer, its text, and why it is wrong where a call is needed
        (calling((NAME, "{}"), (NAME, "{}")), f"{TAG}\n{TAG}", f"{NAME} ×2, not {NAME}"),
        (calling((NAME, "{}"), content="Секунду."), f"Секунду.\n{TAG}", "text around the call"),
        (calling(("get_data", "{}")), tool_call.format_call("get_data", {}), f"get_data, not {NAME}"),
        (calling((NAME, "{id: 1}")), TAG.replace("{}", "{id: 1}"), tool_call.NO_OBJECT),
        (
            calling((NAME, '{"id":1}')),
            TAG.replace("}", "&quot;id&quot;:1}"),
            f"{NAME}: id is 1, and is not due",
        ),
        (calling((NAME, [])), TAG.replace("{}", "[]"), tool_call.NO_OBJECT),
        (completion(TAG, "length"), TAG, "truncated at 80 tokens"),
        (completion(None), "", f"an empty answer, not {NAME}"),
        (completion(odd), odd.replace("\ud83d", "?"), f"text, not {NAME}"),
    ]
    asked = [prompt for prompt, _ in PROBES] + [messages[-1]["content"] for messages, _ in ROWS]

    def say(body):
        last = body["messages"][-1]
        return (
            completion("Сто.")
            if last["role"] == "tool"
            else wrong[asked.index(last["content"]) % len(wrong)][0]
        )

    server = serve(say)
    assert run(server.url, "--json", str(tmp_path / "report.json")) == 1
    assert "\x1b" not in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    failing = {row["line"]: (row["reason"], row["endpoint"]) for row in report["rows"]["failing"]}
    results = [(probe["reason"], probe["endpoint"]) for probe in report["probes"]]
    results += [failing.get(line) for line in range(1, len(ROWS) + 1)]
    for i, (need, reported) in enumerate(zip(NEEDED, results, strict=True)):
        _, text, reason = wrong[i % len(wrong)]
        if not need:
            call = reason.split(", not ")[0] if reason.endswith(f", not {NAME}") else NAME
            call = "an unreadable call" if reason == tool_call.NO_OBJECT else call
            reason = f"{call}, not text" if "<tool_call" in text else "an empty answer"
        if need or text != wrong[-1][1]:
            assert reported == (reason, text)
        else:
            assert reported is None


@pytest.mark.parametrize("arguments", [{}, "", " \n", None, "{ }"])
def test_no_arguments_are_an_empty_object(serve, arguments):
    server = serve(lambda body: calling((NAME, arguments)) if needs(body) else completion("Да."))
    assert run(server.url) == 0


def test_a_call_without_arguments_at_all_has_none():
    response = calling((NAME, None))
    del response["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"]
    assert endpoint.parse_reply(response, 80).text == TAG


@pytest.mark.parametrize("row", GOOD, ids=lambda row: str(len(row["messages"])))
def test_a_conversation_is_sent_in_openais_form_and_read_back_as_it_was(row, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(row), encoding="utf-8")
    ((_, rendered),) = chat_rows.read_rows(tmp_path / "rows.json")
    rendered = rendered["messages"]
    sent = endpoint.openai_messages(rendered)
    assert chat_rows.validate_and_render(sent) == [
        {key: value for key, value in message.items() if key != "weight"} for message in rendered
    ]
    called = {}
    for message in sent:
        assert set(message) <= {"role", "content", "tool_calls", "tool_call_id"}
        called |= {c["id"]: c["function"]["name"] for c in message.get("tool_calls", [])}
    answered = [m["tool_call_id"] for m in sent if m["role"] == "tool"]
    assert [called[i] for i in answered] == [m["name"] for m in rendered if m["role"] == "tool"]
    assert answered == list(called)
    assert all(len(i) == 9 and i.isalnum() for i in called)


def test_results_of_tools_are_sent_as_such_and_the_tools_called_before_are_declared(serve, tmp_path):
    calls = [call("a", "get_rate", '{"of": "USD"}'), call("b")]
    question = [USER, {"role": "assistant", "content": "Секунду.", "tool_calls": calls}]
    question += [{"role": "tool", "tool_call_id": i, "content": f"<{i}>"} for i in ("b", "a")]
    row = {"messages": [*question, {"role": "assistant", "content": "Сто."}]}
    (tmp_path / "rows.json").write_text(json.dumps(row))
    server = serve()
    run(server.url, "--data", f"{tmp_path}/rows.json")
    body = next(b for _, _, _, b in server.requests if b and len(b["messages"]) == 4)
    _, assistant, *results = body["messages"]
    assert assistant["content"] == "Секунду."
    functions = [c["function"] for c in assistant["tool_calls"]]
    assert [f["name"] for f in functions] == ["get_rate", NAME]
    assert [json.loads(f["arguments"]) for f in functions] == [{"of": "USD"}, {}]
    ids = [c["id"] for c in assistant["tool_calls"]]
    assert [(r["tool_call_id"], r["content"]) for r in results] == [(ids[0], "<a>"), (ids[1], "<b>")]
    assert [tool["function"]["name"] for tool in body["tools"]] == [NAME, "get_rate"]


def test_every_function_that_the_rows_call_is_declared(serve, tmp_path):
    call = {"type": "function", "function": {"name": "get_rate", "arguments": '{"of": "USD"}'}}
    messages = [{"role": "user", "content": "Почём доллар?"}, {"role": "assistant", "tool_calls": [call]}]
    (tmp_path / "rows.json").write_text(json.dumps({"messages": messages}))

    def say(body):
        rate = body["messages"] == messages[:1]
        return calling(("get_rate", '{"of":"USD"}')) if rate else like_vllm(body)

    server = serve(say)
    assert run(server.url, "--data", f"{tmp_path}/rows.json", "--json", f"{tmp_path}/report.json") == 0
    declared = [[t["function"]["name"] for t in body["tools"]] for _, _, _, body in server.requests if body]
    assert declared == [[NAME, "get_rate"]] * (7 + 4 + 6)  # results and streams too
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["rows"]["endpoint"]["right"]["recall"]["part"] == 1


def test_tools_are_declared_as_the_rows_do_and_each_answer_has_the_tokens_of_its_own(serve, tmp_path):
    """Of probes and rows: the first declaration of a name, before a name that is only called."""
    schema = {"type": "object", "properties": {"note": {"type": "string"}}, "required": ["note"]}
    other = {"type": "function", "function": {"name": "pay", "parameters": {"type": "object"}}}
    pay = {"type": "function", "function": {"name": "pay", "description": "Pay.", "parameters": schema}}
    long_call = tool_call.format_call("pay", {"note": "x" * 300})
    probes = [row("Заплати", long_call), {**row("Баланс?", TAG), "tools": TOOLS}]
    rows = [{**row("Ещё", long_call), "tools": [pay]}, {**row("И ещё", "y" * 500), "tools": [other]}]
    for name, lines in (("probes.json", probes), ("rows.json", rows)):
        (tmp_path / name).write_text("\n".join(map(json.dumps, lines)))
    server = serve(lambda body: completion("x" * 128 * 81))
    files = ("--probes", f"{tmp_path}/probes.json", "--data", f"{tmp_path}/rows.json")
    assert run(server.url, *files, "--json", f"{tmp_path}/report.json") == 1
    bodies = {body["messages"][-1]["content"]: body for _, _, _, body in server.requests if body}
    for body in bodies.values():
        assert sorted(body["tools"], key=lambda tool: tool["function"]["name"]) == [TOOLS[0], pay]
    limits = [bodies[text]["max_tokens"] for text in ("Заплати", "Баланс?", "Ещё", "И ещё")]
    assert limits == [len(long_call), 80, len(long_call), 250]
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    # 81 tokens' worth of letters are too many where 80 are allowed, and not where more are.
    assert [len(probe["endpoint"]) for probe in report["probes"]] == [128 * 81, 128 * 80]
    assert [failing["line"] for failing in report["rows"]["failing"]] == [1]


def test_where_there_are_no_tools_none_are_declared_and_a_refusal_is_told_once(serve, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(row("Привет", "Да.")))
    server = serve(lambda body: completion("Да."))
    files = ("--probes", f"{tmp_path}/rows.json", "--data", f"{tmp_path}/rows.json")
    assert run(server.url, *files) == 0
    assert not any("tools" in body for _, _, _, body in server.requests if body)
    server.failures = [LISTED, 400, 400]
    with pytest.raises(UserError, match="rejects the request"):
        run(server.url, *files)
    assert len(server.failures) == 1


def test_calls_that_come_as_text_where_others_come_parsed_are_listed(serve, capsys):
    texts = [messages[-1]["content"] for messages, _ in ROWS]

    def mixed(body):
        asked = body["messages"][-1]["content"]
        return (like_llama_cpp if asked in (texts[0], texts[2]) else like_vllm)(body)

    calls = [number for number, (_, answer) in enumerate(ROWS, 1) if answer == TAG]
    assert {1, 3} <= set(calls)
    assert run(serve(mixed).url) == 0
    output = " ".join(capsys.readouterr().out.split())
    places = f"{ROOT}/heldout.json:1, {ROOT}/heldout.json:3"
    said = f"42 parsed tool_calls, 2 unparsed tags in text unparsed, while others are parsed: {places} "
    assert said in output


def test_a_row_of_two_calls_is_right_if_both_come_in_any_order(serve, tmp_path):
    calls = (("get_rate", '{"of": "USD"}'), (NAME, "{}"))
    messages = [{"role": "user", "content": "Баланс и доллар?"}]
    answer = "\n".join(tool_call.format_call(*call) for call in calls)
    row = {"messages": [*messages, {"role": "assistant", "content": answer}]}
    (tmp_path / "rows.json").write_text(json.dumps(row))
    for says in (calls, calls[::-1]):
        server = serve(lambda b, says=says: calling(*says) if b["messages"] == messages else like_vllm(b))
        assert run(server.url, "--data", f"{tmp_path}/rows.json", "--json", f"{tmp_path}/report.json") == 0
        report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
        right = report["rows"]["endpoint"]["right"]["recall"]["part"]
        assert (right, report["rows"]["failing"]) == (1, [])


def test_tools_that_are_not_taken_are_left_out_and_that_is_printed(serve, capsys):
    """What vLLM says without --enable-auto-tool-choice, in its words."""
    says = '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'

    def without_parser(body):
        if "tools" in body:
            return (
                400,
                {"Content-Type": "application/json"},
                json.dumps({"error": {"message": says}}).encode(),
            )
        return like_llama_cpp(body)

    server = serve(without_parser)
    assert run(server.url) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert (
        "0 parsed tool_calls, 44 unparsed tags in text "
        f"tools not declared, since the endpoint rejects them (400: {says})" in output
    )
    assert sum("tools" in (body or {}) for _, _, _, body in server.requests) == 1


def test_the_key_is_sent_and_never_shown(serve, monkeypatch, capsys):
    monkeypatch.setenv(endpoint_client.KEY, "sk-secret\n")
    server = serve()
    assert run(server.url) == 0
    assert {headers["authorization"] for _, _, headers, _ in server.requests} == {"Bearer sk-secret"}
    server.failures = [(400, {"Content-Type": "text/plain"}, b"bad key sk-secret, sk-secret")] * 3
    with pytest.raises(UserError, match=r"rejects the request \(400: bad key …, …\); ") as error:
        run(server.url)
    assert "secret" not in str(error.value) + capsys.readouterr().out
    for wrong in ("sk-\x1bsecret", "sk secret ключ", "a\nsk-secret"):
        monkeypatch.setenv(endpoint_client.KEY, wrong)
        with pytest.raises(
            UserError, match=r"^OPENAI_API_KEY contains characters that no API key has; set it again$"
        ):
            run(server.url)


def test_a_proxy_is_not_asked_for_this_machine(serve, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    server = serve()
    assert run(server.url) == 0
    assert run(server.url.replace("127.0.0.1", "localhost")) == 0


# ------------------------------------------------------------------------------------------ failures

LISTED = {"data": [{"id": "tuned"}]}
HTML = (200, {"Content-Type": "text/html"}, b"<html>Welcome</html>")
SHORT = (400, {}, b'{"error": {"message": "maximum context length is 64"}}')
WRONG_SERVER = "check that --endpoint is an OpenAI-style server, path included: …/v1"
FAILURES = {
    "no key": ([401], "{url} requires an API key (401); set OPENAI_API_KEY"),
    "forbidden": ([403], "{url} requires an API key (403); set OPENAI_API_KEY"),
    "no models": (
        [404],
        "{url} has no /models (404: no); end the address in /v1, or name its model with --model",
    ),
    "an empty list": ([{"data": []}], "{url} lists no models; name one with --model"),
    "no list": ([{"data": [5]}], f"the endpoint's list of models is malformed; {WRONG_SERVER}"),
    "a web page": ([HTML], f"{{url}} does not answer in JSON (text/html); {WRONG_SERVER}"),
    "deep": (
        [(200, {}, b"[" * 100_000)],
        f"{{url}} does not answer in JSON (no content type); {WRONG_SERVER}",
    ),
    "moved": ([307], "{url} redirects (307); use the address it redirects to"),
    "broken": ([500], "{url} rejects the request (500: no); see its log, or name its model with --model"),
    "hangs up": (
        [(None, {}, b"")] * 3,
        "{url} broke the connection (Server disconnected without sending a response.); "
        "see its log, then try again",
    ),
    "no such model": (
        [LISTED, 404],
        "{probes}:1: {url} has no /chat/completions (404: no); "
        "end the address in /v1, and name a model that it has",
    ),
    "a model of another name": (
        [LISTED, (404, {}, b'{"error": {"message": "The model `x` does not exist."}}')],
        "{probes}:1: {url} rejects the request (404: The model `x` does not exist.); "
        "name a model that it has with --model",
    ),
    "short context": (
        [LISTED, SHORT, SHORT],
        "{probes}:1: {url} rejects the request (400: maximum context length is 64); "
        "serve with a longer context (vLLM: --max-model-len, llama.cpp: --ctx-size)",
    ),
    "no completion": (
        [LISTED, {"choices": []}],
        f"{{probes}}:1: the response is not a chat completion; {WRONG_SERVER}",
    ),
    "FastAPI": (
        [LISTED] + [(422, {}, b'{"detail": [{"msg": "x\\u001b"}]}')] * 2,
        '{probes}:1: {url} rejects the request (422: [{"msg": "x\\u001b"}]); change how it is served',
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_is_one_line_with_its_cure(serve, failure):
    server = serve()
    server.failures, says = FAILURES[failure]
    server.failures = list(server.failures)
    with pytest.raises(UserError) as error:
        run(server.url)
    assert str(error.value) == says.replace("{url}", server.url).replace("{probes}", f"{ROOT}/probes.json")
    assert str(error.value).isprintable()
    assert len(server.requests) <= 3


@pytest.mark.parametrize("answer", [5, [], {}, {"choices": None}, {"choices": [{"message": None}]}])
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_is_no_completion_is_an_error(answer, wrapped):
    message = (
        {"content": [5], "tool_calls": None} if answer == {} else {"content": "a", "tool_calls": [answer]}
    )
    with pytest.raises(UserError, match=r"^the response is not a chat completion; "):
        endpoint.parse_reply({"choices": [{"message": message}]} if wrapped else answer, 80)


def test_a_row_in_the_middle_that_fails_is_named_and_the_others_are_let_go(serve):
    def say(body):
        if body["messages"] == ROWS[4][0]:
            return 400, {}, b'{"error": "the request exceeds the available context size"}'
        return like_vllm(body)

    server = serve(say)
    with pytest.raises(
        UserError,
        match=r"^/.*heldout\.json:5: http.* rejects the request \(400: the request .*longer context",
    ):
        run(server.url)
    assert len(server.requests) < 40


def test_a_connection_closed_as_a_request_arrives_is_made_again(serve):
    server = serve()
    server.failures = [LISTED, (None, {}, b""), (None, {}, b"")]
    assert run(server.url) == 0


def test_a_busy_endpoint_is_asked_again_for_a_bounded_time(serve, monkeypatch):
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    server = serve()
    monkeypatch.setattr(endpoint_client.asyncio, "sleep", sleep)
    busy = [(429, {"Retry-After": after}, b"") for after in ("7", "soon", "0")]
    server.failures = [429, 503, *busy]
    assert run(server.url) == 0
    assert waits == [1, 2, 7, 8, 1]
    server.failures = [(429, {"Retry-After": "3600"}, b'{"error": {"message": "quota"}}')]
    with pytest.raises(UserError, match=r"is still busy \(429: quota\); try again later$"):
        run(server.url)
    monkeypatch.undo()
    monkeypatch.setattr(endpoint_client, "BUSY_TIMEOUT", 1.5)
    server.failures = [503] * 9
    with pytest.raises(UserError, match=r"is still busy \(503: no\); try again later$"):
        run(server.url)
    assert len(server.failures) == 7


def test_silence_is_not_waited_for_without_end(serve, monkeypatch):
    monkeypatch.setattr(endpoint_client, "TIMEOUT", 0.3)
    server = serve(lambda body: time.sleep(0.6) or like_vllm(body))
    with pytest.raises(
        UserError, match=r"/probes\.json:1: http.* did not answer within 0\.3 s; see its log$"
    ):
        run(server.url)


def chunked(pieces):
    """Return the pieces as chunks of a body whose length is not said."""
    return {"Transfer-Encoding": "chunked"}, (b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)


def endless():
    return itertools.repeat(b" " * 2**16)


BLANKS = b" " * 2**23
ENDLESS = {
    "without a length": lambda: (200, {}, endless()),
    "in chunks": lambda: (200, *chunked(endless())),
    "of an error": lambda: (500, *chunked(endless())),
    "while busy": lambda: (503, *chunked(endless())),
    "of a length that is said": lambda: (200, {"Content-Length": str(10**12)}, endless()),
    "compressed": lambda: (200, {"Content-Encoding": "gzip"}, gzip.compress(BLANKS)),
    "after a compressed one": lambda: (
        200,
        {"Content-Encoding": "gzip"},
        itertools.chain([gzip.compress(b"{}")], endless()),
    ),
    "twice": lambda: (200, {"Content-Encoding": "gzip, gzip"}, gzip.compress(gzip.compress(BLANKS))),
}


@pytest.mark.parametrize("body", ENDLESS)
@pytest.mark.parametrize("listed", [True, False])
def test_a_body_that_does_not_end_is_read_up_to_a_limit(serve, body, listed):
    server = serve()
    server.failures = [LISTED] * listed + [ENDLESS[body]()]
    where, path = (f"{ROOT}/probes.json:1: ", "chat/completions") if listed else ("", "models")
    with pytest.raises(UserError) as error:
        run(server.url)
    assert str(error.value) == f"{where}{server.url} answers /{path} with more than 4 MiB; {WRONG_SERVER}"


def drip(piece=b" "):
    while True:
        time.sleep(0.05)
        yield piece


@pytest.mark.parametrize(("status", "piece"), [(200, b" "), (503, b" "), (100, b"HTTP/1.1 100 Go\r\n\r\n")])
def test_what_trickles_is_waited_for_no_longer_than_an_answer(serve, monkeypatch, status, piece):
    monkeypatch.setattr(endpoint_client, "TIMEOUT", 0.3)
    server = serve()
    server.failures = [(status, {}, drip(piece))]
    with pytest.raises(UserError, match=r"^http.* did not answer within 0\.3 s; see its log$"):
        run(server.url)


def test_headers_that_do_not_end_are_one_line(serve):
    server = serve()
    server.failures = [(200, {"X-Long": "a" * 2**20}, b"{}")]
    with pytest.raises(UserError, match=r"^http.* broke the connection \(.+\); see its log, then try again$"):
        run(server.url)


@pytest.mark.parametrize("limit", [80, 160])
def test_an_answer_longer_than_its_tokens_can_be_is_truncated(limit):
    text, longest = f"{TAG} " * 10_000, 128 * limit
    for data in (completion(text), calling(*[(NAME, "{}")] * 10_000), calling((NAME, {"a": text}))):
        reply = endpoint.parse_reply(data, limit)
        assert not reply.ended
        assert len(reply.text) == longest
        verdict = judging.judge(judging.Answer(reply.text, reply.ended, []), expected_answer(TAG), limit)
        assert verdict.step in ("form", "name")
        assert verdict.reason.endswith(f"; truncated at {limit} tokens")
    assert endpoint.parse_reply(completion(text[:longest]), limit).ended


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9/v1", "http://nowhere.invalid/v1", "http://..", f"http://{'a' * 300}"]
)
def test_an_endpoint_that_is_not_there_is_one_line_and_exit_2(url):
    code, _, error = run_main(compare.main, "--endpoint", url, folder=ROOT, error_code=2)
    assert code == 2
    assert re.fullmatch(
        r"cannot connect to http\S+ \(.+\); start the server, or correct the address\n", error
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--endpoint", "http://h/v1", "--bits", "4"], "do not apply to a served model"),
        (["--endpoint", "http://h/v1", "--adapter", "qlora_output"], "do not apply to a served model"),
        (["--model", "tuned"], "add --endpoint"),
        *(
            (["--endpoint", url], "not a plain http or https address; expected http://host:port/v1")
            for url in (
                "",
                "localhost:8000",
                "ftp://h",
                "http://u:secret@h/v1",
                "http://h/v1?key=secret",
                "http://h:x",
                "http://[::1",
            )
        ),
    ],
)
def test_flags_that_do_not_go_together_are_refused(capsys, arguments, says):
    with pytest.raises(SystemExit) as stopped:
        compare.parse_arguments(arguments)
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    assert says in shown
    assert "secret" not in shown


def test_without_an_endpoint_the_flags_are_as_before():
    args = compare.parse_arguments([])
    assert (args.adapter, args.bits, args.endpoint) == ("qlora_output", None, None)
    assert compare.parse_arguments(["--adapter", "a", "--bits", "8"]).adapter == "a"


def test_torch_is_not_imported_and_the_exit_codes_are_the_verdict(serve, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    server = serve()
    result = command("--endpoint", server.url, folder=tmp_path, PYTHONPATH=str(tmp_path))
    assert (result.returncode, result.stderr) == (0, "")
    assert "\nverdict    the endpoint passes 6 of 6 probes, " in result.stdout
    server.say = lambda body: completion("Да.")
    code, output, error = run_main(compare.main, "--endpoint", server.url, folder=ROOT)
    assert (code, error) == (1, "")
    short = "the endpoint falls short: 2 of 6 probes pass; F1 0.00 of 40 calls (at least 0.9: --min-f1)\n"
    assert output.endswith(short)
    assert command("--endpoint", server.url, "--json", "no/r.json", folder=tmp_path).returncode == 2


def test_ctrl_c_ends_it_at_once(serve, tmp_path):
    server = serve(lambda body: time.sleep(5) or like_vllm(body))
    copy_questions(tmp_path)
    process = subprocess.Popen(
        [sys.executable, ROOT / "compare.py", "--endpoint", server.url],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while len(server.requests) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "\nstopped\n")
    assert time.monotonic() - began < 3
