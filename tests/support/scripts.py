"""Run a script's main() within this process: importing torch and the rest again takes 12 CPU-seconds."""

import io
import os
import signal
import sys

from tuner.system.scripts import run_script

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


def run_main(main, *arguments, folder=None, **run_script_options):
    """Run `main` as the script would with these arguments; return (exit code, stdout, stderr).

    folder: the working directory, if another than this process's. What the script changes of the process
    (arguments, directory, streams, signal handlers) is restored. A traceback is the test's. Not captured is
    what goes past sys.stdout and sys.stderr: child processes, and the lines that signals.py writes.
    """
    buffers = io.BytesIO(), io.BytesIO()
    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in numbers}
    before = sys.argv, os.getcwd(), sys.stdout, sys.stderr
    script = sys.modules[main.__module__].__file__ or main.__module__
    sys.argv = [os.path.basename(script), *map(str, arguments)]
    # With a buffer below, as the real ones have: console.ignore_broken_pipes wraps it.
    streams = [io.TextIOWrapper(buffer, encoding="utf-8", write_through=True) for buffer in buffers]
    sys.stdout, sys.stderr = streams
    try:
        if folder is not None:
            os.chdir(folder)
        run_script(main, **run_script_options)
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):  # as the interpreter does
            print(code, file=sys.stderr)
            code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        texts = [buffer.getvalue().decode() for buffer in buffers]
        sys.argv, directory, sys.stdout, sys.stderr = before
        os.chdir(directory)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code or 0, *texts
