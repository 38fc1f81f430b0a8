"""What is said when the hub refuses, how files are checked, and huggingface_hub's cache."""

import errno
import hashlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.hub_server import COMMIT, SHARDS, TOKEN, UNWANTED, WANTED, Hub, contents, use_hub
from tuner.model import hub
from tuner.model.folders import BASE_MODEL
from tuner.system.errors import UserError


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "disk is full; free some of it, then run the same command",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk: Disk quota exceeded; fix that"),
        (
            PermissionError(errno.EACCES, "Permission denied", "x.part"),
            "x.part: Permission denied; fix that",
        ),
        (OSError("Consistency check failed:\nmany\nlines"), "check the connection"),
    ],
)
def test_what_stops_a_download(error, words):
    line = str(hub.explain(error, BASE_MODEL))
    assert words in line
    assert "\n" not in line


def test_an_error_says_what_the_hub_refused():
    def error(status, code):
        error = OSError()
        error.response = SimpleNamespace(status_code=status, headers={"X-Error-Code": code} if code else {})
        return error

    answers = [(403, "GatedRepo"), (403, None), (404, "RepoNotFound"), (503, None)]
    about = [hub.explain(error(*answer), BASE_MODEL).about for answer in answers]
    assert about == ["license", "token", "hub", "hub"]


def test_a_file_is_intact_by_the_hubs_own_checksum(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    large = SimpleNamespace(size=7, lfs=SimpleNamespace(sha256=hashlib.sha256(b"content").hexdigest()))
    blob = hashlib.sha1(b"blob 7\0content").hexdigest()  # what `git hash-object` prints
    assert blob == "6b584e8ece562ebffc15d38808cd6b98fc3d97ea"
    small = SimpleNamespace(size=7, lfs=None, blob_id=blob)
    assert hub.is_intact(path, large)
    assert hub.is_intact(path, small)
    path.write_bytes(b"c0ntent")
    assert not hub.is_intact(path, large)
    assert not hub.is_intact(path, small)


def test_fetch_fills_the_cache_once(tmp_path, monkeypatch):
    server = Hub(BASE_MODEL, WANTED | UNWANTED)
    use_hub(monkeypatch, server.url, tmp_path / "hf_home", TOKEN)

    def refused(text, repo=BASE_MODEL):
        with pytest.raises(UserError, match=text) as caught:
            hub.fetch(repo)
        assert TOKEN not in str(caught.value)

    server.refuse = (403, {"X-Error-Code": "GatedRepo"})
    refused("license not accepted")
    server.refuse, server.stated = None, {SHARDS[0]: 10**15}
    refused("needs 1000001.0 GB of free disk")
    server.stated = {}
    assert server.large_requests() == []
    folder = Path(hub.fetch(BASE_MODEL))
    assert contents(folder) == WANTED
    server.requests.clear()
    assert Path(hub.fetch(BASE_MODEL)) == folder
    assert server.requests == []
    refused("not a valid model name", "a/b/c")
    assert Path(hub.fetch(BASE_MODEL, COMMIT)) == folder
    with pytest.raises(UserError, match=r"^google/gemma-3-4b-it: that version is no longer on the hub"):
        hub.fetch(BASE_MODEL, "1" * 40)
    server.close()
