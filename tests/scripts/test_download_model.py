"""download_model.py as a user runs it, against a hub in miniature and (-m rehearsal) the real small model."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import download_model
from tests.support.hub_server import (
    REVISION,
    SHARDS,
    TOKEN,
    UNWANTED,
    WANTED,
    Hub,
    contents,
    environment,
    safetensors_file,
    use_hub,
)
from tests.support.processes import disk_for, other_writer
from tests.support.scripts import run_main
from tuner.model import hub as model_hub
from tuner.model.folders import BASE_MODEL, missing_files
from tuner.system.errors import UserError

SCRIPT = Path(download_model.__file__)


@pytest.fixture
def hub():
    hub = Hub(BASE_MODEL, WANTED | UNWANTED)
    yield hub
    hub.close()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs the script in tmp_path; whatever happens, the token is not shown."""

    def run(endpoint, *arguments, token=None):
        use_hub(monkeypatch, endpoint, tmp_path / "hf_home", token)
        code, stdout, stderr = run_main(download_model.main, *arguments, folder=tmp_path)
        assert TOKEN not in stdout + stderr
        return code, stdout, stderr

    return run


def run_process(tmp_path, endpoint, *arguments, token=None):
    """Run the script as a process in tmp_path; return (exit code, stdout, stderr)."""
    result = subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        cwd=tmp_path,
        env=environment(endpoint, tmp_path / "hf_home", token),
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
    code, stdout, stderr = run_process(tmp_path, hub.url, token=TOKEN)
    assert code == 0, stderr
    folder = tmp_path / "gemma-3-4b-it"
    assert contents(folder) == {**WANTED, **REVISION}
    assert missing_files(folder) == []
    assert not list(tmp_path.glob("*.part*"))
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
    code, stdout, stderr = run_process(tmp_path, hub.url)
    assert (code, stdout, stderr) == (
        0,
        "gemma-3-4b-it is already complete.\nNext: python train_qlora.py\n",
        "",
    )
    assert hub.requests == []


def test_another_model_goes_to_a_folder_of_its_own_name(run, tmp_path):
    hub = Hub(
        "someone/tiny",
        {
            "config.json": b'{"model_type": "gemma3_text"}',
            "tokenizer.json": b"{}",
            "model.safetensors": safetensors_file(1000),
        },
    )
    code, stdout, stderr = run(hub.url, "--model", "someone/tiny")
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
        ["rejected your token"],
    ),
    "bad token, older hub": (401, {}, TOKEN, ["rejected your token (401)", "settings/tokens"]),
    "bad token, gated": (401, {"X-Error-Code": "GatedRepo"}, TOKEN, ["rejected your token (401)"]),
    "license": (403, {"X-Error-Code": "GatedRepo"}, TOKEN, ["license not accepted (403)", PAGE]),
    "narrow token": (403, {"X-Error-Message": "Enable gated"}, TOKEN, ["may not read", "settings/tokens"]),
    "missing": (404, {"X-Error-Code": "RepoNotFound"}, TOKEN, ["no such model", "(404)", PAGE]),
    "missing, no token": (401, {"X-Error-Code": "RepoNotFound"}, None, ["no such model", PAGE]),
    "not a model": (404, {"X-Error-Code": "EntryNotFound"}, None, ["has no config.json"]),
    "hub down": (503, {}, TOKEN, ["HTTP 503", "run the same command again"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_says_in_one_line_why_the_hub_refuses(run, tmp_path, hub, case):
    status, headers, token, words = REFUSALS[case]
    hub.refuse = (status, headers)
    assert_refused(run(hub.url, token=token), tmp_path, hub, BASE_MODEL, *words)


@pytest.mark.parametrize("token", [TOKEN + " two words", TOKEN + "й", TOKEN + "\x01"])
def test_a_token_with_stray_characters_is_not_shown(run, tmp_path, hub, token):
    code, _, stderr = run(hub.url, token=token)
    assert code == 0 or "rejected your token" in stderr


def test_hub_unreachable(run, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = time.monotonic()
    result = run(f"http://127.0.0.1:{port}", token=TOKEN)
    assert time.monotonic() - start < 15
    assert_refused(result, tmp_path, None, "hub unreachable", "proxy", "HF_ENDPOINT")


def test_hub_that_never_answers(run, tmp_path, monkeypatch):
    assert model_hub.CHECK_TIMEOUT <= 10
    monkeypatch.setattr(model_hub, "CHECK_TIMEOUT", 0.5)  # ten seconds of silence teach no more
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        result = run(f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert time.monotonic() - start < 10
    assert_refused(result, tmp_path, None, "hub unreachable")


def test_offline_switch(tmp_path, hub):
    env = environment(hub.url, tmp_path / "hf_home") | {"HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, SCRIPT], cwd=tmp_path, env=env, capture_output=True, text=True)
    result = result.returncode, result.stdout, result.stderr
    assert_refused(result, tmp_path, hub, "HF_HUB_OFFLINE", "unset it")


def test_disk_too_small(run, tmp_path, hub):
    hub.stated = {SHARDS[0]: 10**15}
    result = run(hub.url)
    assert_refused(result, tmp_path, hub, "needs 1000001.0 GB of free disk", "GB are free; free some")


LONG = WANTED | {SHARDS[0]: os.urandom(15_000_000), SHARDS[1]: b""}  # huggingface_hub writes 10 MiB at a time


def test_goes_on_where_the_connection_broke(run, tmp_path, hub):
    hub.cut, hub.down_after_cut = 12_000_000, True
    hub.files = LONG
    code, _, stderr = run(hub.url)
    assert code == 1
    assert "then run the same command again to continue" in stderr.splitlines()[-1]
    assert not (tmp_path / "gemma-3-4b-it").exists()
    assert (tmp_path / "gemma-3-4b-it.part" / (SHARDS[0] + ".incomplete")).stat().st_size == 10 * 2**20

    hub.down = False
    hub.requests.clear()
    code, stdout, stderr = run(hub.url)
    assert code == 0, stderr
    assert "0.0 GB already downloaded" in stdout
    assert [headers.get("range") for headers in hub.large_requests()] == [f"bytes={10 * 2**20}-"]
    assert contents(tmp_path / "gemma-3-4b-it") == {**hub.files, **REVISION}


def test_survives_one_break_by_itself(run, tmp_path, hub):
    hub.files = LONG
    hub.cut = 12_000_000
    code, _, stderr = run(hub.url)
    assert code == 0, stderr
    assert "Error while" not in stderr  # huggingface_hub's own report of the retry
    assert [headers.get("range") for headers in hub.large_requests()] == [None, f"bytes={10 * 2**20}-"]
    assert (tmp_path / "gemma-3-4b-it" / SHARDS[0]).read_bytes() == LONG[SHARDS[0]]


def test_damaged_half_is_thrown_away(run, tmp_path, hub):
    part = tmp_path / "gemma-3-4b-it.part"
    part.mkdir()
    (part / (SHARDS[1] + ".incomplete")).write_bytes(b"not the same bytes")
    (part / SHARDS[0]).write_bytes(b"x" * len(WANTED[SHARDS[0]]))  # of an older commit, say
    code, _, stderr = run(hub.url)
    assert code == 1
    assert (
        f"{SHARDS[1]}: checksum mismatch; file deleted, run the same command again" in stderr.splitlines()[-1]
    )
    assert not (tmp_path / "gemma-3-4b-it").exists()
    code, _, stderr = run(hub.url)
    assert code == 0, stderr
    assert contents(tmp_path / "gemma-3-4b-it") == {**WANTED, **REVISION}


def part_of(tmp_path, name):
    (tmp_path / "gemma-3-4b-it.part").mkdir(exist_ok=True)
    return tmp_path / "gemma-3-4b-it.part" / (name + ".incomplete")


@pytest.mark.parametrize(("name", "more"), [(SHARDS[1], 1000), ("config.json", 1)])
def test_a_half_that_is_larger_than_the_file_is_started_afresh(run, tmp_path, hub, name, more):
    part_of(tmp_path, name).write_bytes(WANTED[name] + b"x" * more)  # of an older commit, say
    code, stdout, stderr = run(hub.url)
    assert code == 0, stderr
    assert "already downloaded" not in stdout
    assert contents(tmp_path / "gemma-3-4b-it") == {**WANTED, **REVISION}


def test_a_half_of_another_file_of_the_same_size_is_not_kept(run, tmp_path, hub):
    part_of(tmp_path, SHARDS[1]).write_bytes(b"x" * len(WANTED[SHARDS[1]]))
    code, _, stderr = run(hub.url)
    assert code == 1
    assert f"{SHARDS[1]}: checksum mismatch; file deleted, run the same command again" in stderr
    assert run(hub.url)[0] == 0
    assert contents(tmp_path / "gemma-3-4b-it") == {**WANTED, **REVISION}


def test_a_half_that_is_a_link_is_replaced_and_what_it_points_to_is_left(run, tmp_path, hub):
    mine = tmp_path / "mine"
    mine.write_bytes(WANTED[SHARDS[1]][:1000])
    part_of(tmp_path, SHARDS[0]).symlink_to(tmp_path / "gone")
    part_of(tmp_path, SHARDS[1]).symlink_to(mine)
    code, _, stderr = run(hub.url)
    assert code == 0, stderr
    assert mine.read_bytes() == WANTED[SHARDS[1]][:1000]
    assert not (tmp_path / "gone").exists()
    assert contents(tmp_path / "gemma-3-4b-it") == {**WANTED, **REVISION}
    assert not any(path.is_symlink() for path in (tmp_path / "gemma-3-4b-it").iterdir())


def test_a_half_that_is_a_folder_is_named_and_left(run, tmp_path, hub):
    part_of(tmp_path, SHARDS[1]).mkdir()
    (part_of(tmp_path, SHARDS[1]) / "mine").write_text("mine")
    code, _, stderr = run(hub.url)
    assert code == 1
    assert f"{SHARDS[1]}.incomplete: Is a directory; fix that, then run the same command" in stderr
    assert (part_of(tmp_path, SHARDS[1]) / "mine").exists()


def test_a_server_that_sends_all_instead_of_the_rest_is_understood(run, tmp_path, hub):
    original = hub.send_file

    def ignore_range(request, name):
        del request.headers["Range"]
        return original(request, name)

    hub.send_file = ignore_range
    part_of(tmp_path, SHARDS[1]).write_bytes(WANTED[SHARDS[1]][:1000])
    code, _, stderr = run(hub.url)
    assert code == 0, stderr
    assert contents(tmp_path / "gemma-3-4b-it") == {**WANTED, **REVISION}


def test_a_server_that_sends_too_much_or_too_little_is_not_believed(run, tmp_path, hub):
    original = hub.files[SHARDS[1]]
    for wrong in (original + b"x" * 1000, original[:-1000]):
        hub.send_file, send = lambda *_, wrong=wrong: hub.send(_[0], 200, wrong), hub.send_file
        code, _, stderr = run(hub.url)
        assert code == 1
        assert len(stderr.splitlines()[-1:]) == 1
        assert not (tmp_path / "gemma-3-4b-it").exists()
        hub.send_file = send
    code, _, stderr = run(hub.url)
    assert code == 0, stderr
    assert contents(tmp_path / "gemma-3-4b-it") == {**WANTED, **REVISION}


def test_the_users_own_part_folder_stays_and_the_next_name_is_resumed(run, tmp_path, hub):
    mine = tmp_path / "gemma-3-4b-it.part"
    mine.mkdir()
    (mine / "config.json").write_text("mine")
    (tmp_path / "gemma-3-4b-it.lock").write_text("mine")
    hub.cut, hub.down_after_cut, hub.files = 12_000_000, True, LONG
    assert run(hub.url)[0] == 1
    hub.down = False
    code, stdout, stderr = run(hub.url)
    assert code == 0, stderr
    assert "GB already downloaded" in stdout
    assert contents(mine) == {"config.json": b"mine"}
    assert (tmp_path / "gemma-3-4b-it.lock").read_text() == "mine"
    assert missing_files(tmp_path / "gemma-3-4b-it") == []
    assert not (tmp_path / "gemma-3-4b-it.part.1").exists()


@pytest.mark.parametrize("target", ["missing", "empty", "stray"])
def test_a_link_to_another_disk_is_filled_there(run, tmp_path, hub, target):
    disk = tmp_path / "disk/gemma"
    disk.parent.mkdir()
    if target != "missing":
        disk.mkdir()
    if target == "stray":
        (disk / ".DS_Store").touch()
    (tmp_path / "gemma-3-4b-it").symlink_to(disk)
    code, _, stderr = run(hub.url)
    assert code == 0, stderr
    assert (tmp_path / "gemma-3-4b-it").is_symlink()
    assert missing_files(disk) == []
    assert [path.name for path in disk.parent.iterdir()] == ["gemma"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "gemma-3-4b-it"]


def test_of_another_model_no_gigabyte_is_downloaded(run, tmp_path, hub):
    hub.files = hub.files | {"config.json": b'{"model_type": "llama"}'}
    code, _, stderr = run(hub.url)
    says = f'{BASE_MODEL} is not a Gemma 3 (config.json: model_type is "llama"); choose another model'
    assert (code, stderr.splitlines()[-1]) == (1, says)
    assert hub.large_requests() == []
    with pytest.raises(UserError) as error:
        model_hub.fetch(BASE_MODEL)
    assert str(error.value) == says
    assert hub.large_requests() == []


def test_a_folder_that_was_cut_short_since_is_not_called_complete(run, tmp_path, hub):
    assert run(hub.url)[0] == 0
    path = tmp_path / "gemma-3-4b-it" / SHARDS[1]
    path.write_bytes(path.read_bytes()[:-1])
    code, out, stderr = run(hub.url)
    assert (code, out) == (1, "")
    assert stderr.startswith(f"gemma-3-4b-it is damaged ({SHARDS[1]}: ")
    assert stderr.endswith("; rename it, and download or merge it again\n")
    path.parent.rename(tmp_path / "damaged")
    assert run(hub.url)[0] == 0


def test_folder_in_the_way(run, tmp_path, hub):
    (tmp_path / "gemma-3-4b-it").mkdir()
    (tmp_path / "gemma-3-4b-it" / "config.json").write_text("{}")
    code, _, stderr = run(hub.url)
    assert code == 1
    missing = "tokenizer.json, model.safetensors missing"
    assert stderr == f"gemma-3-4b-it is not a complete model folder ({missing}); rename it\n"
    assert hub.requests == []


@pytest.mark.parametrize("name", ["", "a/b/c", "../elsewhere", "a--b", "имя"])
def test_name_that_cannot_be_one(run, tmp_path, hub, name):
    code, _, stderr = run(hub.url, "--model", name)
    assert code == 2
    assert "not a valid model name; example: google/gemma-3-4b-it" in stderr
    assert hub.requests == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_or_killed_it_keeps_what_came(run, tmp_path, hub, number):
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
        env=environment(hub.url, tmp_path / "hf_home"),
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(hub.large_requests()) < 2 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    if number == signal.SIGINT:
        assert stderr.splitlines()[-1] == "stopped; run the same command again to continue"
    if number == signal.SIGTERM:
        assert "stopped; run the same command again to continue" in stderr
    assert "Traceback" not in stderr
    assert (tmp_path / "gemma-3-4b-it.part" / SHARDS[1]).exists()
    assert not (tmp_path / "gemma-3-4b-it").exists()
    hub.send_file = original
    code, _, stderr = run(hub.url)
    assert code == 0, stderr
    assert (tmp_path / "gemma-3-4b-it" / SHARDS[0]).read_bytes() == hub.files[SHARDS[0]]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("gemma")] == ["gemma-3-4b-it"]


def test_a_full_disk_keeps_what_came_and_goes_on_from_there(run, tmp_path, hub):
    hub.files = WANTED | {SHARDS[0]: os.urandom(30_000_000)}
    with disk_for(20_000_000):
        code, _, stderr = run(hub.url)
    assert code == 1
    assert "File too large; fix that, then run the same command again to continue" in stderr
    assert not (tmp_path / "gemma-3-4b-it").exists()
    came = (tmp_path / "gemma-3-4b-it.part" / (SHARDS[0] + ".incomplete")).stat().st_size
    assert 19_000_000 < came <= 20_000_000
    hub.requests.clear()
    code, _, stderr = run(hub.url)
    assert code == 0, stderr
    assert [headers["range"] for headers in hub.large_requests()] == [f"bytes={came}-"]
    assert (tmp_path / "gemma-3-4b-it" / SHARDS[0]).read_bytes() == hub.files[SHARDS[0]]


def test_a_second_download_into_a_folder_is_refused(run, tmp_path, hub):
    with other_writer(tmp_path / "gemma-3-4b-it") as pid:
        result = run(hub.url)
    assert_refused(result, tmp_path, hub, f"gemma-3-4b-it is being written by process {pid}; wait")
    assert run(hub.url)[0] == 0


def test_small_needs_its_packages(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    code, stdout, stderr = run("http://127.0.0.1:9", "--small")
    assert (code, stdout) == (1, "")
    assert "(gguf); type: pip install -r requirements-rehearsal.txt" in stderr
    assert len(stderr.splitlines()) == 1


@pytest.mark.rehearsal
def test_small_is_built_in_a_minute(tmp_path):
    start = time.monotonic()
    code, stdout, stderr = run_process(tmp_path, "http://127.0.0.1:9", "--small")
    assert time.monotonic() - start < 60
    assert (code, stderr) == (0, "")
    assert stdout.splitlines()[-1] == "Next: python train_qlora.py --rehearse"
    assert missing_files(tmp_path / "gemma-3-270m") == []
    assert [path.name for path in tmp_path.iterdir()] == ["gemma-3-270m"]


@pytest.mark.rehearsal
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_small_killed_half_way(tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--small"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    while not list(tmp_path.glob(".*.part/new/model.safetensors")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert not (tmp_path / "gemma-3-270m").exists()
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert stderr == "\nstopped; run the same command again\n"
        assert list(tmp_path.iterdir()) == []
