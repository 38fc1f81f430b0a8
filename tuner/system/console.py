"""What a person reads: text made safe to print, colors, and lines that stand above a progress bar."""

import io
import os
import shutil
import sys
import textwrap
from contextlib import suppress


def printable(text, width=60):
    """Returns text as one line of at most `width` characters, control characters replaced."""
    text = "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)
    return text if len(text) <= width else text[: width - 1] + "…"


def colorize(text, colour):
    """Returns text in an ANSI colour, on a terminal that wants one (https://no-color.org)."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{colour}m{text}\x1b[0m"


def print_wrapped(text, first="", indent=""):
    """Prints a model's or a file's text, wrapped: `first` before it, `indent` before its other lines."""
    width = max(40, min(80, shutil.get_terminal_size().columns))
    text = printable(text, 200) or "(nothing)"
    print(textwrap.fill(text, width, initial_indent=first, subsequent_indent=indent))


def is_main_process():
    """Whether this is the process that speaks and writes: the only one, or the first that a launcher made."""
    return os.environ.get("RANK", "0") == "0"


def print_main(text):
    if is_main_process():
        from tqdm import tqdm

        with tqdm.external_write_mode():  # above the bar
            print(text, flush=True)


def ignore_broken_pipes():
    """Has what is printed after a connection dropped or a pipe closed be lost, instead of ending the run."""

    class Steady(io.TextIOWrapper):
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
        setattr(sys, name, Steady(old.detach(), encoding=encoding, errors=errors))
