"""A file is there whole or as it was before, and a folder has one writer at a time."""

import json
from contextlib import suppress

import pytest

from tests.support.processes import disk_for, other_writer
from tuner.system import atomic
from tuner.system.errors import UserError


def test_a_file_replaces_the_old_one_only_when_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with suppress(KeyboardInterrupt), atomic.open_text(path) as file:
        file.write("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    with atomic.open_text(path) as file:
        file.write("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_a_full_disk_leaves_the_old_file_and_names_the_cure(tmp_path):
    path = tmp_path / "a.json"
    atomic.write_json(path, {"ж": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ж": 1}
    with (
        disk_for(100),
        pytest.raises(UserError, match=r"a\.json cannot be written \(File too large\); choose"),
    ):
        atomic.write_json(path, ["a" * 200])
    assert json.loads(path.read_text(encoding="utf-8")) == {"ж": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "a").write_text("a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert atomic.read_bytes(tmp_path / "a") == b"a"
    with pytest.raises(OSError, match="link"):
        atomic.read_bytes(tmp_path / "link")


def test_a_folder_has_one_writer_and_the_lock_of_a_dead_one_is_free(tmp_path):
    output = tmp_path / "out"
    with (
        other_writer(output) as pid,
        pytest.raises(UserError, match=f"is being written by process {pid}; wait until"),
        atomic.exclusive_lock(output),
    ):
        pass
    with atomic.exclusive_lock(output):
        assert (tmp_path / "out.lock").exists()
    assert list(tmp_path.iterdir()) == []
