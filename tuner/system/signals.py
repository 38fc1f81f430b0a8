"""Ctrl-C, SIGTERM and a hang-up: leave cleanly, or finish the step first."""

import gc
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress

# A launcher passes on the Ctrl-C that its processes got already: within this time it is no second one.
REPEAT_SECONDS = 0.3
AGAIN_SECONDS = (
    0.05  # of a time_limit: what is raised in a destructor, or while garbage is collected, is lost
)
FINISHING = b"\nfinishing this step and saving a checkpoint; press Ctrl-C again to quit now\n"


def exit_on_signals(message):
    """Make SIGTERM and a hang-up end the process as Ctrl-C does, so that temporary files are removed.

    message: what is printed then; a later call's takes its place.
    """

    def leave(number, _):
        with suppress(OSError):  # the terminal may be gone
            os.write(2, f"\n{message}\n".encode())
        sys.exit(128 + number)

    leave.is_ours = True
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        before = number and signal.getsignal(number)
        if before == signal.SIG_DFL or getattr(before, "is_ours", False):  # not under nohup
            signal.signal(number, leave)


class OutOfTimeError(Exception):
    """What is done within a time_limit takes longer."""


@contextmanager
def time_limit(seconds):
    """Raise OutOfTimeError within the body after `seconds` of the process's CPU time.

    Regular expressions are interrupted too. On Windows, and beside the main thread, there is no limit.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise OutOfTimeError

    collects = gc.isenabled()
    gc.disable()  # with many objects elsewhere it takes longer than what is limited
    previous = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, AGAIN_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)
        if collects:
            gc.enable()


class StopRequest:
    """The first signal that asked a run to stop; falsy until one came.

    signal: its number, None before. time: when it came, by time.monotonic().
    """

    def __init__(self):
        self.signal = self.time = None

    def __bool__(self):
        return self.signal is not None


@contextmanager
def stop_requests():
    """Give a StopRequest that Ctrl-C, SIGTERM or a hang-up fills in; a second signal ends the process.

    A signal that is ignored stays ignored, as a hang-up is under nohup.
    """
    request = StopRequest()

    def handle(number, _):
        if request and time.monotonic() - request.time > REPEAT_SECONDS:
            os._exit(128 + number)
        if not request:
            request.time, request.signal = time.monotonic(), number
            with suppress(OSError):  # the terminal may be gone; print() may be at work already
                os.write(2, FINISHING)

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if before[number] != signal.SIG_IGN:
            signal.signal(number, handle)
    try:
        yield request
    finally:
        for number in numbers:
            signal.signal(number, before[number])
