"""Print for people: text made safe, colors, wrapped lines, and lines above a progress bar."""

import io
import os
import shutil
import sys
import textwrap
from contextlib import suppress

from tqdm import tqdm

JOINERS = "\u200c\u200d"  # Persian and Hindi words, and emoji of several, need them; they change nothing else


def one_line(text):
    """Return text as one line, with control characters replaced."""
    return "".join(c if c.isprintable() or c in JOINERS else " " if c.isspace() else "\ufffd" for c in text)


def printable(text, width=60):
    """Return text as one line of at most `width` characters, with control characters replaced."""
    text = one_line(text)
    return text if len(text) <= width else text[: width - 1] + "…"


def has_colors():
    """Return whether stdout is a terminal that wants colors (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def colorize(text, color):
    """Return text in an ANSI color (its number, a string or an int), as it is where there are none."""
    return f"\x1b[{color}m{text}\x1b[0m" if has_colors() else text


def print_wrapped(text, first="", indent=""):
    """Print a model's or a file's text, wrapped: `first` before its first line, `indent` before others."""
    width = max(40, min(80, shutil.get_terminal_size().columns))
    text = printable(text, 200) or "(nothing)"
    print(textwrap.fill(text, width, initial_indent=first, subsequent_indent=indent))


def is_main_process():
    """Return whether this process prints and writes: the only one, or the first that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def print_main(text):
    """Print text as one line, above a progress bar if there is one, in the main process only."""
    if is_main_process():
        with tqdm.external_write_mode():
            print(one_line(text), flush=True)


def ignore_broken_pipes():
    """Drop what is printed after a pipe closed or a connection was lost, instead of ending the run."""

    class UnbreakableStream(io.TextIOWrapper):
        def write(self, text):
            with suppress(OSError):
                super().write(text)
                super().flush()  # stdout and stderr stay in the order in which they were written
            return len(text)

        def flush(self):
            with suppress(OSError):
                super().flush()

    for name in ("stdout", "stderr"):
        old = getattr(sys, name)
        encoding, errors = old.encoding, old.errors
        setattr(sys, name, UnbreakableStream(old.detach(), encoding=encoding, errors=errors))
