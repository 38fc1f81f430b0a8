"""Write files and folders whole or not at all: temp file, fsync, rename; one writer at a time."""

import json
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

from tuner.system.errors import UserError


def part_path(path):
    """Return the temporary path, beside `path`, at which it is written until it is whole."""
    return path.with_name(path.name + ".part")


def fsync_tree(path):
    """Flush a file, or a folder and everything in it, to disk."""
    for child in path.iterdir() if path.is_dir() else ():
        fsync_tree(child)
    fsync(path)


def copy_permissions(folder):
    """Give weights the permissions of config.json: safetensors 0.8 lets only their owner read them."""
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", path)


def fsync(path):
    """Flush a file, or the names in a folder, to disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot fsync a folder
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_bytes(path):
    """Return a file's bytes. Raise OSError for a symlink, which could lead out of the folder."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
    with open(handle, "rb") as file:
        return file.read()


def rename_synced(source, target):
    """Rename a file or folder that is on disk into place, and flush its new name too."""
    source.rename(target)
    fsync(target.absolute().parent)


@contextmanager
def open_text(path):
    """Open a text file that replaces `path` when the body ends; after an exception the old file stays.

    OSError is passed on.
    """
    part = part_path(Path(path))
    try:
        with open(part, "w", encoding="utf-8", newline="\n") as file:
            yield file
        fsync_tree(part)
        part.replace(path)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def write_json(path, value, cure="choose another file"):
    """Write `value` to `path` as JSON, atomically. Raise UserError, with the cure, if that fails."""
    try:
        with open_text(path) as file:
            file.write(json.dumps(value, ensure_ascii=False, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); {cure}") from error


def check_parent_writable(output):
    """Return the folder that `output` will be in. Raise UserError if it is not writable."""
    parent = Path(output).absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{parent} is not writable; choose another folder with --output")
    return parent


def is_empty_folder(path):
    return path.is_dir() and not any(path.iterdir())


@contextmanager
def exclusive_lock(output):
    """Hold <output>.lock in the body. Raise UserError if another process holds it.

    The lock is the kernel's: it is released when its process dies, and the next process takes over the file.
    """
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
        raise UserError(f"{output} is being written by {holder}; wait until it has finished") from error
    try:
        path.write_text(f"{os.getpid()}\n")
        yield
    finally:
        with suppress(OSError):  # Windows cannot remove an open file
            path.unlink()  # while it is held: a process waiting for this file sees that it is gone
        lock.release()
