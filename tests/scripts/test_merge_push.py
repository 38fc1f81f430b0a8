"""merge.py --push-to-hub as a user runs it, against a hub in miniature that takes uploads."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

import merge
from tests.support.hub_server import TOKEN, contents, environment
from tests.support.hub_uploads import FINE_TOKEN, OTHER_TOKEN, READ_TOKEN, Uploads, use_uploads
from tests.support.rows import row
from tests.support.scripts import run_main
from tests.support.tiny_models import write_tiny_adapter, write_tiny_model
from tuner.inference import probes
from tuner.model import loading
from tuner.training import adapter_config

SCRIPT = Path(merge.__file__)
BASE = "google/gemma-3-4b-it"
COMMIT = "ab" * 20
PUSH = ("--push-to-hub", "anna/bank")
ADAPTER = ("--adapter-only", *PUSH)
TOKENS = (TOKEN, READ_TOKEN, OTHER_TOKEN, FINE_TOKEN)
OF_A_MODEL = {
    *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"),
    *("tokenizer_config.json", "chat_template.jinja", "NOTICE", "README.md"),
}
OF_AN_ADAPTER = {
    *("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("chat_template.jinja", "NOTICE", "README.md"),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder as work leaves it: a base, an adapter with all that is beside it, and the merged model."""
    folder = tmp_path_factory.mktemp("work")
    base = write_tiny_model(folder / "gemma")
    (folder / "gemma/REVISION").write_text(f"{COMMIT}\n{BASE}\n")
    adapter = write_tiny_adapter(folder / "qlora_output", base)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(folder / "gemma" / name, adapter / name)
    settings = {"lora_r": 16, "data": f"{folder}/rows.json", "model": base, "output": str(adapter)}
    run = {"revision": COMMIT, "settings": settings, "versions": {}, "rows": {"all": 70}}
    run |= {"bits": 4, "steps": 40, "data_sha256": "cd" * 32, "prompts_sha256": ["12" * 32], "tools": ["f"]}
    (adapter / "run.json").write_text(json.dumps(run))
    (adapter / "compare.json").write_text(json.dumps({"data": f"{folder}/held.json"}))
    (adapter / "loss.png").write_bytes(b"png")
    (adapter / "checkpoints/step-000020").mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(adapter / name, adapter / "checkpoints/step-000020" / name)
    (folder / "probes.json").write_text(json.dumps(row("Привет!", "Да.")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "MAX_NEW_TOKENS", 8)
        code, _, stderr = run_main(merge.main, folder=folder)
    assert (code, stderr) == (0, "")
    return folder


@pytest.fixture
def here(work, tmp_path):
    """A copy of that folder, in which the merged model is left out; it comes back by `merged`."""
    shutil.copytree(work, tmp_path / "here", ignore=shutil.ignore_patterns("gemma-merged"))
    config = tmp_path / "here/qlora_output/adapter_config.json"
    config.write_text(config.read_text().replace(str(work), str(tmp_path / "here")))
    return tmp_path / "here"


@pytest.fixture
def merged(work, here):
    shutil.copyfile(work / "qlora_output/adapter_config.json", here / "qlora_output/adapter_config.json")
    shutil.copytree(work / "gemma-merged", here / "gemma-merged")
    return here / "gemma-merged"


@pytest.fixture
def hub():
    hub = Uploads()
    yield hub
    hub.go.set()
    hub.close()


@pytest.fixture
def run(here, hub, monkeypatch):
    """A function that runs merge.py in `here`; whatever happens, no token is shown or written."""
    monkeypatch.setattr(probes, "MAX_NEW_TOKENS", 8)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between its retries

    def run(*arguments, token=TOKEN):
        use_uploads(monkeypatch, hub, here.parent / "hf_home", token)
        result = run_main(merge.main, *arguments, folder=here)
        assert not [one for one in TOKENS if one in result[1] + result[2]]
        assert_no_token_in(here.parent)
        return result

    return run


@pytest.fixture
def merges_nothing(monkeypatch):
    monkeypatch.setattr(loading, "load_base", lambda *_: pytest.fail("merged"))


def assert_no_token_in(folder):
    for path in folder.rglob("*"):
        assert path.is_dir() or not [one for one in TOKENS if one.encode() in path.read_bytes()]


def assert_tells_nothing_of(folder, files):
    for name, content in files.items():
        for secret in (str(folder), "rows.json", "held.json", "12" * 32, "hf_"):
            assert secret.encode() not in content, name


def refused(result, *words, code=1):
    """Assert that a run ended with this code and one line on stderr, with these words in it."""
    assert result[0] == code
    line = result[2].splitlines()[-1]
    assert code == 2 or len(result[2].splitlines()) == 1
    for word in words:
        assert word in line


# -------------------------------------------------------------------------------------- what is pushed


def test_a_merged_model_is_pushed_privately_with_its_card_and_once(run, here, hub, monkeypatch):
    code, stdout, stderr = run(*PUSH)
    assert (code, stderr) == (0, "")
    assert stdout.splitlines()[0] == "pushing    gemma-merged (0.2 MB) to anna/bank, a new private repository"
    assert stdout.splitlines()[-2] == f"pushed     {hub.url}/anna/bank (private), 0.2 MB"
    repository = hub.repositories["anna/bank"]
    assert repository["private"]
    assert len(repository["commits"]) == 1
    files = repository["files"]
    del files[".gitattributes"]
    assert set(files) == OF_A_MODEL
    assert files == {k: v for k, v in contents(here / "gemma-merged").items() if k != "run.json"}
    assert_tells_nothing_of(here, files)

    monkeypatch.setattr(loading, "load_base", lambda *_: pytest.fail("merged again"))
    files["config.json"] = b"an earlier one"
    code, stdout, stderr = run(*PUSH)
    assert (code, stderr) == (0, "")
    assert "to anna/bank, a private repository that exists and whose model is replaced\n" in stdout
    assert (
        f"\nproof      gemma-merged is qlora_output merged into {here / 'gemma'}, tensor by tensor\n"
        in stdout
    )
    assert repository["files"]["config.json"] == (here / "gemma-merged/config.json").read_bytes()


def test_of_an_adapter_goes_what_others_need(run, here, hub, merges_nothing):
    before = contents(here / "qlora_output/checkpoints/step-000020")
    config = (here / "qlora_output/adapter_config.json").read_text()
    code, stdout, stderr = run(*ADAPTER)
    assert (code, stderr) == (0, "")
    assert stdout.splitlines() == [
        "pushing    qlora_output (0.2 MB) to anna/bank, a new private repository",
        f"pushed     {hub.url}/anna/bank (private), 0.2 MB",
    ]
    files = hub.repositories["anna/bank"]["files"]
    assert set(files) == OF_AN_ADAPTER | {".gitattributes"}
    assert_tells_nothing_of(here, files)
    assert files["adapter_model.safetensors"] == before["adapter_model.safetensors"]
    pushed = json.loads(files["adapter_config.json"])
    assert pushed == json.loads(config) | {"base_model_name_or_path": BASE}
    adapter_config.check("pushed", pushed)
    assert (here / "qlora_output/adapter_config.json").read_text() == config
    assert not (here / "gemma-merged").exists()


@pytest.mark.parametrize("flags", [PUSH, ADAPTER], ids=["merged", "adapter"])
def test_the_card_has_a_head_that_the_hub_reads(run, hub, merged, flags):
    run(*flags)
    card = ModelCard(hub.repositories["anna/bank"]["files"]["README.md"].decode())
    library = {"library_name": "transformers"}
    if flags == ADAPTER:
        library = {"library_name": "peft", "base_model_relation": "adapter"}
    assert card.data.to_dict() == {"base_model": BASE, "license": "gemma", **library}
    assert f"(revision `{COMMIT}`)" in card.text
    assert "https://ai.google.dev/gemma/terms" in card.text
    assert ("merged into its text model" in card.text) == (flags == PUSH)


@pytest.mark.parametrize("name", ["bank", "anna/bank"])
@pytest.mark.parametrize(("flags", "private"), [((), True), (("--public",), False)])
def test_public_is_only_what_was_asked_for(run, hub, name, flags, private):
    code, stdout, _ = run("--adapter-only", "--push-to-hub", name, *flags)
    assert code == 0
    assert hub.repositories["anna/bank"]["private"] == private
    visibility = "private" if private else "public"
    assert f"a new {visibility} repository\n" in stdout
    assert f"/anna/bank ({visibility}), " in stdout


def test_a_public_repository_that_exists_is_not_filled_unasked(run, hub):
    repository = hub.add("anna/bank", private=False)
    refused(run(*ADAPTER), "anna/bank is public; add --public if everybody may have this model")
    assert repository["files"] == {}
    code, stdout, _ = run(*ADAPTER, "--public")
    assert (code, set(repository["files"])) == (0, OF_AN_ADAPTER)
    assert "to anna/bank, a public repository that exists\n" in stdout
    hub.add("anna/bank")
    assert run(*ADAPTER, "--public")[1].endswith("/anna/bank (private), 0.2 MB\n")
    assert hub.repositories["anna/bank"]["private"]


def test_what_an_earlier_model_had_more_goes_and_what_is_not_ours_stays(run, hub, merged):
    ours = {"model-00001-of-00002.safetensors": b"1", "model.safetensors.index.json": b"{}"}
    theirs = {"notes.md": b"mine", "bank.gguf": b"gguf", "onnx/config.json": b"{}"}
    repository = hub.add("anna/bank", **ours, **theirs)
    assert run(*PUSH)[0] == 0
    assert set(repository["files"]) == OF_A_MODEL | set(theirs)


def test_configs_that_name_folders_are_pushed_without(run, here, hub, merged):
    for folder, name in ((merged, "config.json"), (here / "qlora_output", "tokenizer_config.json")):
        values = json.loads((folder / name).read_text())
        values |= {"_name_or_path": "../gemma", "tokenizer_file": f"{here}/gemma/tokenizer.json", "kept": "/"}
        (folder / name).write_text(json.dumps(values))
        run("--push-to-hub", name[:-5], *(["--adapter-only"] if folder != merged else []))
        pushed = json.loads(hub.repositories[f"anna/{name[:-5]}"]["files"][name])
        assert {k: v for k, v in values.items() if k not in ("_name_or_path", "tokenizer_file")} == pushed


def test_a_link_to_a_file_elsewhere_is_not_followed(run, here, hub):
    (here.parent / "secret").write_text("{}")
    (here / "qlora_output/tokenizer_config.json").unlink()
    (here / "qlora_output/tokenizer_config.json").symlink_to(here.parent / "secret")
    refused(run(*ADAPTER), "tokenizer_config.json is a link to a file elsewhere")
    assert hub.requests == []


def test_an_adapters_base_needs_a_name_that_others_know(run, here, hub):
    (here / "gemma/REVISION").unlink()
    where = f"the base of qlora_output is {here}/gemma, which does not say its name on the hub"
    refused(run(*ADAPTER), f"{where}; add --base {BASE}, or what its name is")
    assert hub.requests == []
    assert run(*ADAPTER, "--base", "google/gemma-3-1b-it")[0] == 0
    pushed = json.loads(hub.repositories["anna/bank"]["files"]["adapter_config.json"])
    assert pushed["base_model_name_or_path"] == "google/gemma-3-1b-it"


# ------------------------------------------------------------------------------ refused before any work

REFUSED = {
    "no token": (None, "anna/bank", "anna/bank: no token; create one that may write at https://"),
    "not valid": ("hf_no", "anna/bank", "the hub rejected your token (401); create one that may write"),
    "read only": (READ_TOKEN, "anna/bank", "anna/bank: your token may only read; create one that may write"),
    "another's": (OTHER_TOKEN, "anna/bank", "your token may not write it (403: You have no rights to create"),
    "fine-grained": (FINE_TOKEN, "anna/old", "your token may not write it (403: You have no write rights)"),
    "other kind": (TOKEN, "anna/gguf", "anna/gguf holds "),
}


@pytest.mark.parametrize("flags", [(), ("--adapter-only",)], ids=["merged", "adapter"])
@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.usefixtures("merges_nothing")
def test_what_cannot_be_pushed_is_told_before_anything_is_merged(run, here, hub, what, flags):
    token, name, says = REFUSED[what]
    hub.add("anna/old")
    hub.add("anna/gguf", **{"config.json" if flags else "adapter_config.json": b"{}"})
    refused(run("--push-to-hub", name, *flags, token=token), says)
    assert not (here / "gemma-merged").exists()
    assert not any(method == "PUT" or "commit" in path for method, path, _ in hub.requests)
    assert set(hub.repositories) == {"anna/old", "anna/gguf"}


@pytest.mark.usefixtures("merges_nothing")
def test_a_hub_that_is_not_there_is_told_before_anything_is_merged(run, here, hub, monkeypatch):
    hub.close()
    refused(run(*PUSH), "anna/bank: hub unreachable (ConnectError); check the connection, the proxy and")
    use_offline = monkeypatch.setattr
    original = use_uploads

    def offline(*arguments):
        original(*arguments)
        use_offline(constants, "HF_HUB_OFFLINE", True)

    monkeypatch.setattr(sys.modules[__name__], "use_uploads", offline)
    refused(run(*PUSH), "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set; unset it to push")
    assert not (here / "gemma-merged").exists()


@pytest.mark.usefixtures("merges_nothing")
def test_a_hub_that_is_silent_is_not_waited_for(run, hub, monkeypatch):
    monkeypatch.setattr("tuner.model.hub.CHECK_TIMEOUT", 0.2)
    for path in ("/whoami-v2", "/api/models/anna/bank"):
        hub.waits = path
        refused(run(*PUSH), "anna/bank: hub unreachable (ReadTimeout)")


def test_a_repository_that_the_hub_makes_public_gets_nothing(run, hub):
    hub.makes_public = True
    refused(run(*ADAPTER), f"the hub made it public; make it private: {hub.url}/anna/bank/settings")
    assert hub.repositories["anna/bank"]["commits"] == []


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--push-to-hub", "a/b/c"), "--push-to-hub 'a/b/c' is no name of a repository; example: "),
        (("--push-to-hub", ""), "--push-to-hub '' is no name"),
        (("--push-to-hub", "имя"), "is no name"),
        (("--public",), "--public needs --push-to-hub"),
        (("--adapter-only",), "--adapter-only needs --push-to-hub"),
        ((*ADAPTER, "--output", "x"), "--adapter-only writes no folder; leave out --output and --overwrite"),
        ((*ADAPTER, "--overwrite"), "--adapter-only writes no folder"),
    ],
)
def test_flags_that_do_not_fit_are_wrong_arguments(run, hub, flags, says):
    refused(run(*flags), says, code=2)
    assert hub.requests == []


def test_another_adapters_merged_model_is_not_pushed(run, here, hub, merged):
    weights = here / "qlora_output/adapter_config.json"
    weights.write_text(weights.read_text().replace('"lora_alpha": 32', '"lora_alpha": 16'))
    refused(
        run(*PUSH), "gemma-merged is not qlora_output merged into its base: ", "; add --overwrite to merge"
    )
    assert hub.repositories["anna/bank"]["commits"] == []
    assert run(*PUSH, "--overwrite")[0] == 0
    pushed = hub.repositories["anna/bank"]["files"]["model.safetensors"]
    assert pushed == (merged / "model.safetensors").read_bytes()


def test_overwrite_merges_again(run, hub, merged):
    (merged / "README.md").write_text("an edited card")
    code, stdout, _ = run(*PUSH, "--overwrite")
    assert code == 0
    assert "\nmerging " in stdout
    assert hub.repositories["anna/bank"]["files"]["README.md"].startswith(b"---\nbase_model: ")


def test_a_merged_model_that_was_damaged_is_not_pushed(run, hub, merged):
    path = merged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(run(*PUSH), "gemma-merged is damaged (model.safetensors: ")
    assert hub.repositories["anna/bank"]["commits"] == []


# ------------------------------------------------------------------------------------ broken in the middle


@pytest.mark.parametrize(
    ("part", "status", "says"),
    [
        ("/lfs/", 403, "your token may not write it (403"),
        ("/lfs/", 503, "error of the hub (HTTP 503"),
        ("/lfs/", None, "hub unreachable (RemoteProtocolError); check the connection"),
        ("/commit/", 413, "error of the hub (HTTP 413: no space is left for Bearer …); wait a few minutes"),
        ("/commit/", None, "hub unreachable (RemoteProtocolError)"),
    ],
)
def test_what_breaks_in_the_middle_leaves_the_merged_model_and_says_how_to_go_on(
    run, here, hub, merged, part, status, says
):
    before, hub.breaks = contents(merged), {part: (10, status)}
    again = "then push gemma-merged again: python merge.py --push-to-hub anna/bank"
    result = run(*PUSH)
    refused(result, f"anna/bank: {says}", again)
    assert contents(merged) == before
    assert hub.repositories["anna/bank"]["commits"] == []
    hub.breaks = {}
    words = result[2].split("again: python merge.py ")[1].split()
    assert run(*words)[0] == 0
    assert set(hub.repositories["anna/bank"]["files"]) == OF_A_MODEL | {".gitattributes"}


def test_the_command_that_pushes_again_has_the_flags_of_this_one(run, here, hub):
    hub.breaks = {"/commit/": (9, 503)}
    shutil.move(here / "qlora_output", here / "my adapter")
    flags = ["--adapter", "my adapter", "--base", BASE, "--probes", "my.json"]
    typed = "--adapter 'my adapter' --base google/gemma-3-4b-it --probes my.json"
    again = f"push my adapter again: python merge.py {typed} --adapter-only --push-to-hub bank --public"
    refused(run(*flags, "--adapter-only", "--push-to-hub", "bank", "--public"), again)


# ----------------------------------------------------------------------------- terminals, signals, hf_xet


def start(here, hub, *arguments, **streams):
    env = environment(hub.url, here.parent / "hf_home", TOKEN)
    return subprocess.Popen([sys.executable, SCRIPT, *arguments], cwd=here, env=env, **streams)


def read_until(terminal, words):
    text = b""
    while words not in text:
        text += os.read(terminal, 1000)
    return text.decode()


@pytest.mark.parametrize(
    ("answer", "piped"),
    [
        ("", None),
        ("yes please", None),
        ("YES", None),
        ("n", "stdout"),
        ("y", "stdout"),
    ],
)
def test_where_a_terminal_can_ask_only_yes_pushes(here, hub, answer, piped):
    flags = ADAPTER if answer in ("y", "YES") else PUSH
    main, terminal = pty.openpty()
    streams = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    process = start(here, hub, *flags, **streams | ({piped: subprocess.DEVNULL} if piped else {}))
    os.close(terminal)  # or reading would wait for ever for a process that has ended
    what = "qlora_output" if flags == ADAPTER else "gemma-merged"
    text = read_until(main, b"? [y/N] ")
    assert f"push {what} (0.2 MB) to anna/bank, a new private repository? [y/N] " in text
    assert hub.repositories == {}
    os.write(main, f"{answer}\n".encode())
    code = process.wait(timeout=60)
    os.set_blocking(main, False)
    text += os.read(main, 10_000).decode()
    os.close(main)
    assert TOKEN not in text
    if flags == ADAPTER:
        assert code == 0
        assert set(hub.repositories["anna/bank"]["files"]) == OF_AN_ADAPTER | {".gitattributes"}
        assert piped or f"pushed     {hub.url}/anna/bank (private), 0.2 MB" in text
    else:
        assert code == 1
        assert text.endswith("nothing was merged or pushed; answer y to push\r\n")
        assert hub.repositories == {}
        assert not (here / "gemma-merged").exists()


def test_where_nobody_can_answer_nobody_is_asked(here, hub):
    main, terminal = pty.openpty()
    streams = {"stdin": subprocess.DEVNULL, "stdout": terminal, "stderr": terminal}
    assert start(here, hub, *ADAPTER, **streams).wait(timeout=60) == 0
    assert "[y/N]" not in os.read(main, 10_000).decode()
    os.close(main)
    os.close(terminal)
    assert len(hub.repositories["anna/bank"]["commits"]) == 1


def test_hf_xet_which_real_users_have_brings_it_in_one_commit_too(here, hub, merged):
    hub.breaks = {"/preupload/": (1, 503)}  # asked again, without a word
    process = start(here, hub, *PUSH, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, "")
    assert f"pushed     {hub.url}/anna/bank (private), 0.2 MB" in stdout
    repository = hub.repositories["anna/bank"]
    assert len(repository["commits"]) == 1
    assert repository["files"]["model.safetensors"].startswith(b"sha256 ")
    assert any(path.startswith("/cas/v1/xorbs") for _, path, _ in hub.requests)
    assert TOKEN not in stdout
    assert_no_token_in(here.parent)


def test_what_hf_xet_is_refused_is_told_as_that(here, hub, merged):
    hub.breaks = {"/xet-write-token/": (9, 403)}
    process = start(here, hub, *PUSH, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    stdout, stderr = process.communicate(timeout=60)
    refused((process.returncode, stdout, stderr), "anna/bank: your token may not write it (403); create one")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_while_it_is_pushed_the_merged_model_stays(here, hub, merged, number):
    before, hub.waits = contents(merged), "/cas/v1/xorbs"
    process = start(here, hub, *PUSH, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert hub.waiting.wait(60)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert stderr == "\nstopped; push gemma-merged again: python merge.py --push-to-hub anna/bank\n"
    assert contents(merged) == before
    assert hub.repositories["anna/bank"]["commits"] == []
