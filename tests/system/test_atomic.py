"""A file is there whole or as it was before, and a folder has one writer at a time."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.processes import ROOT, disk_for, other_writer
from tuner.system import atomic, output_folder
from tuner.system.errors import UserError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


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


def test_files_of_the_user_beside_it_stay(tmp_path):
    path = tmp_path / "report.json"
    for name in ("report.json.part", ".report.json.part", "report.json.old", ".report.json.abcdefgh.part"):
        (tmp_path / name).write_text("mine")
    folder = tmp_path / ".report.json.12345678.part"  # the name is as ours, and it is not marked
    folder.mkdir()
    (folder / "new").write_text("mine")
    atomic.write_json(path, 1)
    assert path.read_text() == "1\n"
    others = [entry for entry in tmp_path.rglob("*") if entry.is_file() and entry != path]
    assert [entry.read_text() for entry in others] == ["mine"] * 5


def test_a_name_that_is_no_text_is_kept_in_json(tmp_path):
    name = os.fsdecode(b"\xff \xd0\xb6.json")
    atomic.write_json(tmp_path / name, {"data": name})
    assert (tmp_path / name).read_text(encoding="utf-8") == '{\n "data": "\\udcff ж.json"\n}\n'
    assert json.loads((tmp_path / name).read_bytes()) == {"data": name}


def test_what_a_link_leads_to_is_written_and_the_link_stays(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "report.json"
    link.symlink_to("disk/report.json")
    for value in (1, 2):  # there is no such file yet, and then there is
        atomic.write_json(link, value)
        assert link.is_symlink()
        assert (tmp_path / "disk/report.json").read_text() == f"{value}\n"
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match=r"loop cannot be written .Too many levels"):
        atomic.write_json(tmp_path / "loop", 1)
    assert (tmp_path / "loop").is_symlink()


def test_a_pipe_or_device_is_written_to_and_never_replaced(tmp_path):
    reader, writer = os.pipe()
    atomic.write_json(f"/dev/fd/{writer}", [1])
    assert json.loads(os.read(reader, 100)) == [1]
    os.close(reader)
    os.close(writer)
    (tmp_path / "null").symlink_to("/dev/null")
    before = os.stat("/dev/null").st_ino
    atomic.write_json(tmp_path / "null", [1])
    assert os.stat("/dev/null").st_ino == before


def test_what_a_killed_writer_left_goes_and_what_a_live_one_writes_stays(tmp_path):
    path = tmp_path / "a.txt"
    writing = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from tuner.system import atomic\n"
        f"with atomic.open_text({str(path)!r}):\n    print('there', flush=True); time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", writing], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"there\n"
    try:
        (theirs,) = tmp_path.iterdir()
        atomic.write_json(path, 1)
        assert sorted(tmp_path.iterdir()) == sorted([theirs, path])
    finally:
        process.kill()
        process.communicate()
    assert (theirs / "new").exists()
    (tmp_path / ".a.txt.12345678.part").mkdir()  # killed before it was marked
    atomic.write_json(path, 2)
    assert list(tmp_path.iterdir()) == [path]


def test_what_was_moved_aside_goes_back_or_moves_on_and_is_never_lost(tmp_path):
    """A merge that was killed: between two renames, after both, and before another took the name."""
    target = tmp_path / "out"

    def leave(new, earlier):
        work = tmp_path / ".out.abcd1234.part"
        work.mkdir()
        output_folder.mark(work)
        for name, texts in (("new", new), ("earlier", earlier)):
            if texts:
                (work / name).mkdir()
                for text in texts:
                    (work / name / text).write_text(text)

    leave(new=["config.json"], earlier=["config.json", "mine"])
    atomic.clear_workspaces(target, ["config.json"])
    assert names(tmp_path) == ["out"]
    assert names(target) == ["config.json", "mine"]
    leave(new=[], earlier=["config.json", "notes"])
    (target / "config.json").write_text("new")
    atomic.clear_workspaces(target, ["config.json"])
    assert names(target) == ["config.json", "mine", "notes"]
    assert (target / "config.json").read_text() == "new"
    leave(new=["config.json"], earlier=["config.json"])
    atomic.clear_workspaces(target, ["config.json"])
    assert names(tmp_path) == ["out", "out.1"]
    assert names(tmp_path / "out.1") == ["config.json"]


def test_a_folder_that_cannot_be_renamed_is_filled_and_complete_last(monkeypatch, tmp_path):
    mount, source = tmp_path / "disk", tmp_path / "disk/.new"
    (mount / "lost+found").mkdir(parents=True)
    source.mkdir()
    for name in ("config.json", "a", "z"):
        (source / name).write_text(name)
    monkeypatch.setattr(os.path, "ismount", lambda path: path == mount)
    moved, replace = [], Path.replace

    def watched(path, target):
        moved.append(path.name)
        assert output_folder.is_vacant(mount)  # killed here, it may be filled again
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", watched)
    atomic.move_into_place(source, mount, "config.json")
    assert moved[-1] == "config.json"
    assert names(mount) == ["a", "config.json", "lost+found", "z"]
    assert not output_folder.is_vacant(mount)


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
        assert [path.name for path in tmp_path.iterdir()] == [".out.tuner.lock"]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_has_one_lock_whatever_leads_to_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep/out").mkdir(parents=True)
    (tmp_path / "alias").symlink_to("deep/out")
    (tmp_path / "around").symlink_to("deep")
    (tmp_path / "coming").symlink_to("deep/new")
    for one, other in (("alias", "deep/out"), ("around/out", "alias"), ("coming", "deep/new")):
        with (
            atomic.exclusive_lock(one),
            pytest.raises(UserError, match=f"^{other} is being written by process {os.getpid()}; wait"),
            atomic.exclusive_lock(other),
        ):
            pass
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "deep/out")
    with atomic.exclusive_lock("alias"):
        assert names(tmp_path / "deep/out") == [".out.tuner.lock"]


def test_a_lock_that_cannot_be_written_is_one_line_and_files_of_the_user_stay(tmp_path):
    (tmp_path / "uv.lock").write_text("mine")
    with (
        disk_for(0),
        pytest.raises(UserError, match=r"^[^\n]*uv cannot be locked .* too large.; free some disk space$"),
        atomic.exclusive_lock(tmp_path / "uv"),
    ):
        pass
    with atomic.exclusive_lock(tmp_path / "uv"):
        pass
    assert (tmp_path / "uv.lock").read_text() == "mine"
    assert names(tmp_path) == ["uv.lock"]
    with (
        pytest.raises(UserError, match=r"cannot be locked .*File name too long.; name another folder"),
        atomic.exclusive_lock(tmp_path / ("x" * 250)),
    ):
        pass
