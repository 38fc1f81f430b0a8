"""The folder that an output goes to: which one a path leads to, whether it may be used, where to work on it.

No name is taken for ours: what these scripts made and have not finished carries MARK.
"""

import os
import re
import stat
from contextlib import suppress
from pathlib import Path

from tuner.system.console import printable
from tuner.system.errors import UserError

CURE = "name another folder with --output"
IN_IT = "a folder in it"
MARK = ".tuner"
# What systems, file managers, editors and git put into folders by themselves.
STRAY = re.compile(
    r"lost\+found|system volume information|\$recycle\.bin|thumbs\.db|desktop\.ini|icon\r"
    r"|\.(ds_store|localized|directory|fseventsd|spotlight-v100|temporaryitems|documentrevisions-v100)"
    r"|\._.*|\.(trash|nfs|fuse_hidden).*|\.ipynb_checkpoints|\.git(keep|ignore|attributes)",
    re.IGNORECASE,
)


def tidy(text):
    """Return a typed path as it is shown: without a slash at its end."""
    return text and str(Path(text))


def resolve(output, cure=CURE):
    """Return the absolute Path of the folder that `output` leads to, through links; it need not exist.

    Raise UserError, with the cure, for what can be no output folder: a file, a loop of links, a name that is
    empty or too long, and a folder that is around this one or around the user's home.
    """
    shown = printable(str(output), 200) or '""'
    if not str(output):
        raise UserError(f"{shown} names no folder; {cure}")
    if (home := os.path.expanduser(output)) != str(output):  # of `--output=~/x`: a shell leaves it as it is
        raise UserError(f"{shown} would be a folder of the name {Path(output).parts[0]} here; write {home}")
    path = Path(os.path.realpath(output))
    try:
        if not stat.S_ISDIR(path.stat().st_mode):
            raise UserError(f"{shown} is a file; {cure}")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"{shown} cannot be used ({error.strerror}); {cure}") from error
    for inner, whose in ((".", "the folder you are in"), (os.path.expanduser("~"), "your home")):
        if Path(os.path.realpath(inner)).is_relative_to(path):
            raise UserError(f"{shown} is {whose}, or one around it; {cure.replace('another folder', IN_IT)}")
    return path


def is_vacant(output):
    """Return whether there is no such folder, or one with nothing in it but STRAY and unfinished work."""
    folder = Path(os.path.realpath(output))
    if not folder.is_dir():
        return not folder.exists()
    with suppress(OSError):  # it may not be listed
        return is_marked(folder) or all(is_stray(path) for path in folder.iterdir())
    return False


def is_stray(path):
    """Return whether a path in a folder counts for nothing; it is left alone all the same."""
    return bool(STRAY.fullmatch(path.name)) or path.name.startswith(f".{path.parent.name}.")


def mark(folder):
    """Mark a folder as made by these scripts, and not finished."""
    Path(folder, MARK).touch()


def unmark(folder):
    Path(folder, MARK).unlink(missing_ok=True)


def is_marked(folder):
    return Path(folder, MARK).is_file()


def is_fixed(folder):
    """Return whether a resolved folder cannot be renamed: a mount point, or its parent is not writable."""
    return folder.is_dir() and (is_mount(folder) or not os.access(folder.parent, os.W_OK))


def is_mount(folder):
    """Return whether a folder is a mount point; os.path.ismount sees no bind mount from the same disk."""
    if os.path.ismount(folder):
        return True
    with suppress(OSError):  # Linux has it
        for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
            point = re.sub(rb"\\(\d{3})", lambda code: bytes([int(code[1], 8)]), line.split(b" ")[4])
            if point == os.fsencode(folder):
                return True
    return False


def work_folder(folder):
    """Return where the lock of a resolved folder is, and what is unfinished of it: on the same disk.

    That is its parent, or the folder itself if it cannot be renamed.
    """
    return folder if is_fixed(folder) else folder.parent


def check_writable(output, cure="choose another folder with --output"):
    """Return the folder to work in. Raise UserError if that, or the output folder itself, is not writable."""
    folder = resolve(output)
    place = work_folder(folder)
    for path in (place, folder):
        if not os.access(path, os.W_OK) and (path == place or path.exists()):
            raise UserError(f"{path} is not writable; {cure}")
    return place


def free_name(path):
    """Return the first of path.1, path.2, … that is not there."""
    return next(numbered for numbered in numbered_names(path) if not os.path.lexists(numbered))


def numbered_names(path):
    return (path.with_name(f"{path.name}.{number}") for number in range(1, 10**6))
