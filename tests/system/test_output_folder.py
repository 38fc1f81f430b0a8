"""Which folder a path leads to, and which one may not be an output."""

import os
import subprocess

import pytest

from tuner.system import output_folder
from tuner.system.errors import UserError


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        ("", '"" names no folder; name another folder'),
        (".", ". is the folder you are in, or one around it; name a folder in it with --output"),
        ("..", ".. is the folder you are in, or one around it"),
        ("/", "/ is the folder you are in, or one around it"),
        ("here/../../inner", "is the folder you are in"),
        ("home", "home is your home, or one around it"),
        ("~", "~ would be a folder of the name ~ here; write "),
        ("~root/out", "~root/out would be a folder of the name ~root here; write "),
        ("~/out", "~/out would be a folder of the name ~ here; write "),
        ("file", "file is a file; name another folder with --output"),
        ("to-file", "to-file is a file"),
        ("file/out", "file/out cannot be used (Not a directory); name another folder"),
        ("loop", "loop cannot be used (Too many levels of symbolic links)"),
        ("loop/out", "loop/out cannot be used ("),
        ("x" * 300, "… cannot be used (File name too long); name another"),
        ("/dev/null", "/dev/null is a file"),
    ],
)
def test_what_can_be_no_output_is_one_line_with_the_cure(monkeypatch, tmp_path, output, problem):
    folder = tmp_path / "inner"
    (folder / "home/me").mkdir(parents=True)
    (folder / "file").touch()
    (folder / "to-file").symlink_to("file")
    (folder / "loop").symlink_to("loop")
    (folder / "here").mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder / "home/me"))
    with pytest.raises(UserError) as caught:
        output_folder.resolve(output)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_path_leads_through_links_to_a_folder_that_need_not_be_there(monkeypatch, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    os.symlink("../disk/out", "alias")
    os.symlink("alias", "second")
    for path in ("alias", "second", "./alias/", "../disk/out"):
        assert output_folder.resolve(path) == tmp_path / "disk/out"
    assert output_folder.is_vacant("second")
    assert output_folder.tidy("out/") == "out"


def test_a_folder_with_what_systems_leave_in_it_is_vacant(tmp_path):
    for name in (
        ".DS_Store",
        "._x",
        "Thumbs.db",
        "desktop.ini",
        "lost+found",
        ".ipynb_checkpoints",
        ".nfs01",
    ):
        (tmp_path / name).touch()
        assert output_folder.is_vacant(tmp_path), name
    for name in ("notes.txt", ".bashrc", ".git"):
        (tmp_path / name).touch()
        assert not output_folder.is_vacant(tmp_path), name
        (tmp_path / name).unlink()


def test_a_bind_mount_of_the_same_disk_is_a_mount_point(tmp_path):
    disk, mount = tmp_path / "disk", tmp_path / "a mount ж"
    disk.mkdir()
    mount.mkdir()
    assert not output_folder.is_fixed(mount)
    if subprocess.run(["mount", "--bind", disk, mount], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        assert output_folder.is_fixed(mount)
        assert output_folder.work_folder(mount) == mount
        assert not output_folder.is_fixed(disk)
    finally:
        subprocess.run(["umount", mount], check=True)


def test_what_is_unfinished_of_a_mount_point_is_in_it(monkeypatch, tmp_path):
    mount = tmp_path / "disk"
    mount.mkdir()
    assert output_folder.work_folder(mount) == tmp_path
    monkeypatch.setattr(os.path, "ismount", lambda path: path == mount)
    assert output_folder.work_folder(mount) == mount
    assert output_folder.check_writable(mount) == mount
