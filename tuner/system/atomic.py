"""Files and folders that are there whole or not at all: temp file, fsync, rename, one writer at a time."""

import json
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

from tuner.system.errors import UserError


def part_path(path):
    """Returns the path beside `path` that it is written at until it is whole."""
    return path.with_name(path.name + ".part")


def fsync_tree(path):
    """Has the disk keep a file, or a folder and all that is in it, before it gets its name."""
    for child in path.iterdir() if path.is_dir() else ():
        fsync_tree(child)
    fsync(path)


def copy_permissions(folder):
    """Gives weights the rights of config.json: safetensors 0.8 lets none but their owner read them."""
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", path)


def fsync(path):
    """Has the disk keep a file, or the names in a folder."""
    if path.is_dir() and os.name == "nt":  # Windows syncs no folders
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_bytes(path):
    """Returns a file's bytes; raises OSError for a link, which could lead out of the folder."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
    with open(handle, "rb") as file:
        return file.read()


def rename_synced(source, target):
    """Renames a synced file or folder into place, and has the disk keep the new name."""
    source.rename(target)
    fsync(target.absolute().parent)


@contextmanager
def open_text(path):
    """Gives a text file that becomes `path` once it is whole; OSError passes, and an earlier one stays."""
    part = part_path(Path(path))
    try:
        with open(part, "w", encoding="utf-8", newline="\n") as file:
            yield file
        fsync_tree(part)
        part.replace(path)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def write_json(path, value, cure="name another file"):
    """Writes a JSON file whole; raises UserError with the cure if it cannot."""
    try:
        with open_text(path) as file:
            file.write(json.dumps(value, ensure_ascii=False, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); {cure}") from error


def check_parent_writable(output):
    """Returns the folder that `output` is to stand in; raises UserError if it cannot be written to."""
    parent = Path(output).absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{parent} cannot be written to; name another folder with --output")
    return parent


def is_empty_folder(path):
    return path.is_dir() and not any(path.iterdir())


@contextmanager
def exclusive_lock(output):
    """Holds <output>.lock meanwhile; raises UserError if another process does.

    The lock is the kernel's: a process that dies lets go of it, and the next one takes the file over.
    """
    import filelock

    path = Path(output).absolute()
    path = path.with_name(path.name + ".lock")
    lock = filelock.FileLock(path)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout as error:
        try:
            holder = f"process {int(path.read_text())}"
        except (OSError, ValueError):
            holder = "another process"
        raise UserError(f"{output} is being written by {holder}; wait until that has ended") from error
    try:
        path.write_text(f"{os.getpid()}\n")
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file
            path.unlink()  # while it is held: whoever waits for this file sees that it is gone
        lock.release()
