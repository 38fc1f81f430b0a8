"""Ctrl-C, SIGTERM and a hang-up: leave cleanly, or finish the step first."""

import os
import signal
import sys
import time
from contextlib import contextmanager, suppress

REPEAT_SECONDS = (
    0.3  # seconds: a launcher passes on the Ctrl-C that its processes got already; that is no second one
)


def exit_on_signals(told="stopped; the same command begins again, or goes on where it can"):
    """Has SIGTERM and a hang-up end the process like Ctrl-C: what was begun aside is cleared away."""

    def leave(number, _):
        with suppress(OSError):  # the terminal may be gone
            os.write(2, f"\n{told}\n".encode())
        sys.exit(128 + number)

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) == signal.SIG_DFL:  # not under nohup
            signal.signal(number, leave)


@contextmanager
def stop_requests():
    """Gives a list that Ctrl-C, SIGTERM and a hang-up put their number into; a second one ends the process.

    What is ignored already stays so: under nohup, a hang-up is none.
    """
    asked = []

    def note(number, _):
        if asked and time.monotonic() - asked[1] > REPEAT_SECONDS:
            os._exit(128 + number)
        if not asked:
            asked.extend([number, time.monotonic()])
            with suppress(OSError):  # the terminal may be gone; print() may be at work already
                os.write(2, b"\nfinishing what is in hand, to keep it; once more: at once\n")

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {n: signal.getsignal(n) for n in numbers}
    for number in numbers:
        if before[number] != signal.SIG_IGN:
            signal.signal(number, note)
    try:
        yield asked
    finally:
        for number in numbers:
            signal.signal(number, before[number])
