"""serve.py: its flags, what it serves, what it prints, signals."""

import concurrent.futures
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest
from bitsandbytes.nn import Linear4bit

import serve
from tests.support import fork_server
from tests.support.chat_client import USER, client_of, post
from tests.support.rows import row
from tests.support.scripts import run_main
from tests.support.tiny_models import write_tiny_adapter
from train_qlora import quantization_config
from tuner.inference import generation
from tuner.serving import http_server
from tuner.system.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def arguments(*words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["serve.py", *words])
        return serve.parse_arguments()


def test_flags_and_their_defaults(capsys):
    plain = {
        "model": "gemma-3-4b-it-merged",
        "adapter": None,
        "base": None,
        "bits": None,
        "host": "127.0.0.1",
        "port": 8000,
        "probes": "probes.json",
    }
    assert vars(arguments()) == plain
    given = ["--adapter", "a", "--base", "b", "--bits", "8", "--host", "::1", "--port", "0", "--probes", "p"]
    changed = {"adapter": "a", "base": "b", "bits": 8, "host": "::1", "port": 0, "probes": "p"}
    assert vars(arguments(*given)) == {**plain, **changed}
    assert arguments("--model", "m").model == "m"
    two_models = [["--adapter", "a", "--model", "b"], ["--base", "b"]]
    for wrong in (["--port", "x"], ["--port", "65536"], ["--bits", "3"], *two_models):
        with pytest.raises(SystemExit) as left:
            arguments(*wrong)
        assert left.value.code == 2
        assert len(capsys.readouterr().err.splitlines()[-1]) < 120


@pytest.fixture(scope="module")
def adapter(tiny_text_model, tmp_path_factory):
    return str(write_tiny_adapter(tmp_path_factory.mktemp("adapter") / "qlora_output", tiny_text_model))


def run(*arguments, folder):
    """Run serve.py in this process; return its exit code and the one line of its error."""
    code, _, error = run_main(serve.main, "--port", "0", *arguments, folder=folder)
    assert error.count("\n") == 1
    return code, error


def test_what_a_user_can_fix_is_one_line_and_exit_1(tmp_path, tiny_text_model, adapter, monkeypatch):
    monkeypatch.setattr(generation, "load_model", lambda *_: pytest.fail("loaded"))
    code, error = run(folder=tmp_path)
    assert code == 1
    assert error.startswith(
        "gemma-3-4b-it-merged does not exist; create it: python merge.py, or serve the adapter"
    )
    code, error = run("--adapter", adapter, "--base", "./none", folder=tmp_path)
    assert (code, error.split(";")[0]) == (1, "./none does not exist")
    code, error = run("--model", adapter, folder=tmp_path)
    assert (code, error) == (
        1,
        f"{adapter} is an adapter; serve it on its base: python serve.py --adapter {adapter}\n",
    )
    (tmp_path / "config.json").write_bytes(Path(tiny_text_model, "config.json").read_bytes())
    code, error = run("--model", ".", folder=tmp_path)
    assert (code, error) == (
        1,
        ". is not a complete model folder (tokenizer.json missing); check --model, or merge again\n",
    )
    code, error = run("--adapter", "none", folder=tmp_path)
    assert code == 1
    assert error.startswith("none ")
    assert error.endswith("train an adapter first: python train_qlora.py\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, error = run("--port", taken.getsockname()[1], folder=tmp_path)
    assert code == 1
    assert "--port" in error
    code, error = run("--host", "0.0.0.0", folder=tmp_path)
    assert code == 1
    assert "--host 0.0.0.0 exposes the server" in error
    monkeypatch.setenv("SERVE_API_KEY", "слово")
    text = "SERVE_API_KEY contains characters that no header can carry; use Latin letters and digits\n"
    assert run(folder=tmp_path) == (1, text)


def test_probes_are_read_before_the_model_and_those_named_must_be_there(tmp_path, adapter, monkeypatch):
    monkeypatch.setattr(generation, "load_tuned", lambda *_: pytest.fail("loaded"))
    flags = ("--adapter", adapter, "--probes")
    missing = "none.json: no such file; name it with --probes\n"
    assert run(*flags, "none.json", folder=tmp_path) == (1, missing)
    (tmp_path / "probes.json").write_text('{"messages": 5}')
    for named in (("--probes", "probes.json"), ()):
        code, error = run("--adapter", adapter, *named, folder=tmp_path)
        assert code == 1
        assert error.startswith('probes.json:1: "messages" is a number; ')


def test_the_page_has_the_probes_or_without_the_default_file_none(tmp_path, adapter, monkeypatch):
    def texts_of(*flags):
        shown = []

        class Service:
            def __init__(self, model, tokenizer, names, key, probes):
                shown.extend(messages[-1]["content"] for messages in (probes.conversations if probes else ()))
                raise UserError("enough")

        monkeypatch.setattr(http_server, "ChatService", Service)
        monkeypatch.setattr(generation, "load_tuned", lambda *_: (None, None, {}))
        code, error = run("--adapter", adapter, *flags, folder=tmp_path)
        assert (code, error) == (1, "enough\n")
        return shown

    assert texts_of() == []
    (tmp_path / "mine.json").write_text(json.dumps(row("Мой?", "Да.", "А вчера?", "Нет.")))
    assert texts_of("--probes", "mine.json") == ["А вчера?"]
    (tmp_path / "mine.json").rename(tmp_path / "probes.json")
    assert texts_of() == ["А вчера?"]


def test_full_memory_while_starting_is_one_line_with_its_cure(tiny_text_model):
    options = {"out_of_memory": serve.OUT_OF_MEMORY}

    class OutOfMemoryError(RuntimeError):
        pass

    def full(*_):
        raise OutOfMemoryError("CUDA out of memory …")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "load_model", full)
        arguments = ("--model", tiny_text_model, "--port", "0")
        code, _, error = run_main(serve.main, *arguments, **options)
    assert (code, error) == (1, f"GPU out of memory; {serve.OUT_OF_MEMORY}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http_server.ChatService, "warm_up", full)
        code, _, error = run_main(serve.main, *arguments, **options)
    assert (code, error) == (1, f"GPU out of memory; {serve.OUT_OF_MEMORY}\n")
    assert "--bits 4" in serve.OUT_OF_MEMORY


def test_nothing_heavy_is_imported_before_flags_and_folder_are_checked(tmp_path):
    heavy = ("torch", "transformers", "datasets", "bitsandbytes", "peft", "fastapi", "uvicorn", "pydantic")
    for name in heavy:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')")
    result = subprocess.run(
        [sys.executable, ROOT / "serve.py", "--port", "0"],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.startswith("gemma-3-4b-it-merged does not exist; create it: python merge.py")


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("tuned", [False, True])
def test_the_folders_name_is_the_models_and_bits_quantize_it(
    tiny_text_model, adapter, bits, tuned, monkeypatch
):
    services = []

    class Server:
        def __init__(self, service, announce):
            services.append(service)
            self.run = lambda sockets: announce()

    monkeypatch.setattr(http_server, "Server", Server)
    source = ["--adapter", adapter] if tuned else ["--model", f"{tiny_text_model}/"]
    quantize = ["--bits", str(bits)] if bits else []
    code, output, error = run_main(serve.main, "--port", "0", *source, *quantize)
    assert (code, error) == (0, "")
    (service,) = services
    assert any(isinstance(module, Linear4bit) for module in service.model.modules()) == (bits == 4)
    assert not service.model.training
    assert service.names == (["tuned", "base"] if tuned else [Path(tiny_text_model).name])
    lines = output.splitlines()
    assert lines[0] == f"loading    {source[1]}"
    how = "in 4 bits" if bits else "unquantized"
    assert lines[1] == f"models     {', '.join(service.names)}: {source[1]}, {how}, on the CPU"


# ------------------------------------------------------------------------------------ as a process


@contextlib.contextmanager
def command(*arguments, env=None):
    """Start serve.py as a user does; give the process once it answers, and its lines."""
    environment = {"CUDA_VISIBLE_DEVICES": "", **(env or {})}
    process = fork_server.start_script("serve.py", "--port", "0", *arguments, env=environment)
    try:
        lines = [process.stdout.readline() for _ in range(4)]
        url = lines[2].split()[1].removesuffix("/v1,") if lines[2] else None
        yield process, SimpleNamespace(url=url, lines=lines)
    finally:
        process.kill()
        process.wait()


def test_base_and_adapter_answer_as_compare_has_them_answer(adapter, tiny_text_model):
    asked = [{"role": "user", "content": "Привет"}]
    wanted = {
        "tuned": generation.answer_all(
            *generation.load_tuned(adapter, None, quantization_config)[:2], [asked]
        )[0].text
    }
    wanted["base"] = generation.answer_all(
        *generation.load_model(tiny_text_model, "tiny", None, quantization_config), [asked]
    )[0].text
    with command("--adapter", adapter) as (_, server):
        assert "loading " in server.lines[0]
        assert server.lines[1] == f"models     tuned, base: {adapter}, unquantized, on the CPU\n"
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
def test_a_signal_is_handled_from_the_first_printed_address_on(tiny_text_model, name, code):
    with command("--model", tiny_text_model) as (process, _):
        process.send_signal(getattr(signal, name))
        assert process.wait(20) == code
        assert process.stderr.read() == "\nstopped\n"
