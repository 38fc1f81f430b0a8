"""Write files and folders whole or not at all: temp file, fsync, rename; one writer at a time.

What is unfinished stands in a workspace: a hidden folder of a random name with MARK in it, which its owner
keeps locked. Of what killed processes left, only such folders are removed.
"""

import errno
import json
import os
import re
import shutil
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

from tuner.system import output_folder
from tuner.system.errors import UserError
from tuner.system.output_folder import MARK

NEW, EARLIER = "new", "earlier"  # in a workspace: what will get the name, and what had it before

# ------------------------------------------------------------------------------------------ workspaces


@contextmanager
def workspace(target, replaced=()):
    """Yield a new folder, marked and locked, in which to make what will be `target`; remove it at the end.

    target: a resolved path. Workspaces of it whose owner was killed are removed too. An EARLIER in one goes
    back to `target` if that is gone; else all in it but what is `replaced`, patterns of names, moves there.
    """
    clear_workspaces(target, replaced)
    folder = output_folder.work_folder(target)
    path = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=folder))
    lock = filelock.FileLock(path / MARK)
    try:
        lock.acquire(blocking=False)
        yield path
    finally:
        _close(path, target, lock, replaced)


def clear_workspaces(target, replaced=()):
    """Do for workspaces of `target` what their owners, who were killed, can no longer do."""
    name = re.compile(rf"\.{re.escape(target.name)}\.\w{{8}}\.part")
    folder = output_folder.work_folder(target)
    paths = []
    with suppress(OSError):  # it is not there, or may not be listed
        paths = [path for path in folder.iterdir() if name.fullmatch(path.name) and not path.is_symlink()]
    for path in paths:
        with suppress(OSError):  # killed before it was marked, or after
            path.rmdir()
        with suppress(OSError):  # a lock that is held too, and what belongs to another user
            if output_folder.is_marked(path):
                lock = filelock.FileLock(path / MARK)
                lock.acquire(blocking=False)
                _close(path, target, lock, replaced)


def _close(path, target, lock, replaced):
    """Save what is EARLIER in a workspace that is locked, and remove the rest, its mark last."""
    new, earlier = path / NEW, path / EARLIER
    try:
        if earlier.is_dir():
            if not target.exists():
                rename_synced(earlier, target)
            elif new.exists():  # something else got the name since its owner was killed
                rename_synced(earlier, output_folder.free_name(target))
            else:
                move_entries(earlier, target, besides=replaced)
        for child in (new, earlier):
            if child.is_dir():
                shutil.rmtree(child, ignore_errors=True)
            else:
                child.unlink(missing_ok=True)
    finally:
        lock.release()
    with suppress(OSError):
        if not new.exists() and not earlier.exists():
            output_folder.unmark(path)
            path.rmdir()


def move_entries(source, target, besides=()):
    """Move what is in one folder into another that does not have it, but names that match `besides`."""
    for path in source.iterdir():
        if not os.path.lexists(target / path.name) and not any(path.match(name) for name in besides):
            rename_synced(path, target / path.name)


def move_into_place(source, target, last, aside=None):
    """Give the finished folder `source` the name `target`, a resolved path.

    aside: the path that gets what has that name now; without one, that is a vacant folder. last: the name of
    the file that makes it complete: files move one by one if `target` holds something or cannot be renamed.
    """
    copy_permissions(source)
    fsync_tree(source)
    if aside and target.exists() and not output_folder.is_fixed(target):
        rename_synced(target, aside)
    with suppress(OSError):  # it is not there, holds something, or is a mount point
        target.rmdir()
    if target.exists():
        output_folder.mark(target)
        for path in sorted(source.iterdir(), key=lambda path: path.name == last):
            path.replace(target / path.name)
        fsync(target)
        source.rmdir()
    else:
        rename_synced(source, target)
    output_folder.unmark(target)


# ---------------------------------------------------------------------------------------------- files


def copy_permissions(folder):
    """Give weights the permissions of config.json: safetensors 0.8 lets only their owner read them."""
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", path)


def fsync_tree(path):
    """Flush a file, or a folder and everything in it, to disk."""
    for child in path.iterdir() if path.is_dir() else ():
        fsync_tree(child)
    fsync(path)


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

    A link is followed; a pipe or device is written to as it is. OSError is passed on.
    """
    target = Path(os.path.realpath(path))
    if target.is_symlink() or (Path(path).exists() and not Path(path).is_file()):  # a loop raises OSError
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            yield file
        return
    with new_file(target) as part, open(part, "w", encoding="utf-8", newline="\n") as file:
        yield file


@contextmanager
def new_file(target):
    """Yield where to write what becomes the file `target`, a resolved path, when the body ends."""
    with workspace(target) as work:
        yield work / NEW
        fsync_tree(work / NEW)
        (work / NEW).replace(target)


def to_json(value):
    """Return a value as JSON text; half a character, of a file name that is not UTF-8, as its escape."""
    text = json.dumps(value, ensure_ascii=False, indent=1) + "\n"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def write_json(path, value, cure="choose another file"):
    """Write `value` to `path` as JSON, atomically. Raise UserError, with the cure, if that fails."""
    try:
        with open_text(path) as file:
            file.write(to_json(value))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); {cure}") from error


# ---------------------------------------------------------------------------------------------- locks


@contextmanager
def exclusive_lock(output, cure=output_folder.CURE):
    """Hold the lock of the folder that `output` leads to.

    Raise UserError if another process holds it or, with the cure, if it cannot be locked. The lock is the
    kernel's: it is released when its process dies, and the next process takes over the file.
    """
    folder = output_folder.resolve(output, cure)
    path = output_folder.work_folder(folder) / f".{folder.name}.tuner.lock"
    lock = filelock.FileLock(path)
    try:
        try:
            lock.acquire(blocking=False)
            path.write_text(f"{os.getpid()}\n")
        except filelock.Timeout as error:
            try:
                holder = f"process {int(path.read_text())}"
            except (OSError, ValueError):
                holder = "another process"
            raise UserError(f"{output} is being written by {holder}; wait until it has finished") from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                cure = "free some disk space"
            reason = f"{path} cannot be written: {error.strerror}"
            raise UserError(f"{output} cannot be locked ({reason}); {cure}") from error
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):  # Windows cannot remove an open file
                path.unlink()  # while it is held: a process waiting for this file sees that it is gone
            lock.release()
