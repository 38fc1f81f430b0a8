"""Run train_qlora.py again and again, kill it at random moments and resume it; a forked child each.

    python killing.py FOLDER ARGUMENT …

All libraries are imported once. Print a JSON line of an undisturbed run. Then, for each line `SEED MOMENTS`
on stdin, one for each moment: where the run was killed, what it left, and the sha256 of the adapter that it
ends with. Half of the moments are of the clock, half are file operations of the run's; both are spread over
all of it. The first operation is within the writing of a checkpoint, the second of the final adapter's.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_qlora
from tuner.system import libraries
from tuner.system.scripts import run_script

with libraries.heavy_imports():  # all that train_qlora.tune imports
    import datasets  # noqa: F401

    from tuner.data import tokenized  # noqa: F401
    from tuner.model import fused, gemma_tokenizer, loading, lora  # noqa: F401
    from tuner.system import devices  # noqa: F401
    from tuner.training import (  # noqa: F401
        adapter_weights,
        checkpoint_state,
        checkpoints,
        gpu_budget,
        loss_functions,
        loss_plot,
        trainer,
    )


# Drawing the curves would be a third of a run, and no kill within it leaves anything else behind.
loss_plot.plot = lambda history, path: Path(path).write_bytes(b"\x89PNG")


def start(arguments, log, on_operation=None):
    """Fork a process that runs the script; return its pid. on_operation(number) sees its file operations."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        if on_operation:
            watch(on_operation)
        sys.argv = ["train_qlora.py", *arguments]
        run_script(train_qlora.main)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def watch(on_operation):
    """Call on_operation(number) before each write, sync, rename and removal that checkpoints are made of."""
    count = 0

    def counted(function):
        def wrapper(*args, **kwargs):
            nonlocal count
            count += 1
            on_operation(count)
            return function(*args, **kwargs)

        return wrapper

    for owner, name in [
        *[(os, name) for name in ("fsync", "unlink", "rmdir")],
        *[(Path, name) for name in ("write_bytes", "write_text", "mkdir", "rename", "unlink", "rmdir")],
        *[(shutil, name) for name in ("copyfile", "rmtree")],
    ]:
        setattr(owner, name, counted(getattr(owner, name)))


def exit_code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def sha256(folder):
    return hashlib.sha256(Path(folder, "adapter_model.safetensors").read_bytes()).hexdigest()


def half_written(output):
    """Return what is being written: the name of a workspace in `output`, or None."""
    parts = [path.name for path in Path(output).rglob(".*.part") if path.is_dir()]
    return min(parts, default=None)


def undisturbed_run(arguments):
    """Run it undisturbed; return (seconds, [what is half written at each operation], adapter's sha256)."""
    log = os.open("operations", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def note(_):
        os.write(log, f"{json.dumps(half_written('undisturbed'))}\n".encode())

    began = time.monotonic()
    pid = start([*arguments, "--output", "undisturbed"], "log", note)
    assert exit_code(pid) == 0, Path("log").read_text()
    seconds, adapter = time.monotonic() - began, sha256("undisturbed")
    shutil.rmtree("undisturbed")
    return seconds, [json.loads(line) for line in Path("operations").read_text().splitlines()], adapter


def kill_at(moment, number):
    if number == moment:
        os.kill(os.getpid(), signal.SIGKILL)


def choose_moments(chance, count, seconds, operations):
    """Return [(whether it is of the clock, moment, whether there must be a checkpoint by then), …].

    A moment is in seconds, or the number of an operation from 1. Of the clock's, all but the first come after
    a checkpoint, and count from there: a busy machine is slower at one time than at another.
    """
    clocks = count - count // 2
    moments = [(True, seconds * (0.35 + 0.65 * chance.random() / clocks), False)]
    moments += [(True, seconds / 2 * (i + chance.random()) / clocks, True) for i in range(clocks - 1)]
    for kind in (".checkpoint.", ".adapter.")[: count // 2]:
        within = [i + 1 for i, part in enumerate(operations) if part and part.startswith(kind)]
        moments.append((False, chance.choice(within), False))
    spread = count - len(moments)
    for i in range(spread):
        moments.append((False, 1 + int(len(operations) * (i + chance.random()) / spread), False))
    return moments


def has_ended(pid):
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def run_until(arguments, by_clock, moment, has_checkpoint):
    """Start a run and kill it at a moment; return whether it was killed, and had not ended before."""
    if by_clock:
        pid = start(arguments, "log")
        while has_checkpoint and not checkpoints.checkpoint_dirs(arguments[-1]) and not has_ended(pid):
            time.sleep(0.01)
        time.sleep(moment)
        os.kill(pid, signal.SIGKILL)
    else:
        pid = start(arguments, "log", partial(kill_at, moment))
    return exit_code(pid) == -signal.SIGKILL


def killed_run(arguments, by_clock, moment, has_checkpoint):
    """Start a run and kill it at a moment, or earlier if it ends before that; return the moment."""
    while not run_until(arguments, by_clock, moment, has_checkpoint):
        shutil.rmtree(arguments[-1], ignore_errors=True)
        moment = moment * 0.8 if by_clock else moment - 1
    return moment


def kill_and_resume(arguments, by_clock, moment, has_checkpoint):
    """Kill a run and resume it; return a dict of what it left, and of the adapter that it ends with."""
    output = arguments[-1]
    moment = killed_run(arguments, by_clock, moment, has_checkpoint)
    left = sorted({path.name for path in Path(output).rglob("*") if path.is_dir()})
    whole = len(checkpoints.checkpoint_dirs(output))
    is_complete = Path(output, "adapter_config.json").is_file()  # killed while the checkpoints are removed
    code = exit_code(start([*arguments, "--resume"], "log"))
    if not whole and not is_complete:
        assert "has nothing to resume" in Path("log").read_text(), Path("log").read_text()
        assert code == 1
        code = exit_code(start(arguments, "log"))
    assert code == 0, Path("log").read_text()
    extra = [str(path) for path in Path(output).rglob(".*")]
    result = {"moment": moment, "left": left, "whole": whole, "extra": extra, "sha256": sha256(output)}
    shutil.rmtree(output)
    return result


def main():
    folder, arguments = sys.argv[1], sys.argv[2:]
    os.chdir(folder)
    undisturbed_run(arguments)  # what is slow the first time is not measured
    seconds, operations, adapter = undisturbed_run(arguments)
    print(json.dumps({"sha256": adapter, "seconds": seconds, "operations": len(operations)}), flush=True)
    for line in sys.stdin:
        seed, count = line.split()
        for moment in choose_moments(random.Random(seed), int(count), seconds, operations):
            result = kill_and_resume([*arguments, "--output", "killed"], *moment)
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
