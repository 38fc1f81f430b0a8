"""Runs train_qlora.py again and again, kills it at random moments and has it go on; a child each, forked.

    python killing.py FOLDER SEED MOMENTS ARGUMENT …

All libraries are imported once. Prints a JSON line of an undisturbed run, then one for each moment: where it
was killed, what it left, and the sha256 of the adapter that it ends with. Half of the moments are of the
clock, half are file operations of the run's.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import accelerate  # noqa: F401
import bitsandbytes  # noqa: F401
import datasets  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import peft  # noqa: F401
import torch  # noqa: F401
import transformers

import train_qlora
from tuner.training import checkpoints

for name in ("AutoModelForCausalLM", "AutoTokenizer", "get_cosine_schedule_with_warmup"):
    getattr(transformers, name)  # they are imported when they are first named


def start(arguments, log, on_operation=None):
    """Forks a process that runs the script, returns its pid; on_operation(number) sees its writes."""
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
        train_qlora.main()
        code = 0
    except SystemExit as error:
        code = error.code or 0
    finally:
        sys.stdout.flush()
        os._exit(code)


def watch(on_operation):
    """Calls on_operation(number) before each write, sync, rename and removal that checkpoints are made of."""
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


def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def sha256(folder):
    return hashlib.sha256(Path(folder, "adapter_model.safetensors").read_bytes()).hexdigest()


def whole_run(arguments):
    """Runs it undisturbed; returns (seconds, file operations, sha256 of the adapter)."""
    counts = os.open("operations", os.O_WRONLY | os.O_CREAT)
    began = time.monotonic()
    pid = start([*arguments, "--output", "whole"], "log", lambda n: os.pwrite(counts, b"%9d" % n, 0))
    assert ended(pid) == 0, Path("log").read_text()
    seconds, adapter = time.monotonic() - began, sha256("whole")
    shutil.rmtree("whole")
    return seconds, int(Path("operations").read_text()), adapter


def kill_at(moment, number):
    if number == moment:
        os.kill(os.getpid(), signal.SIGKILL)


def killed_run(arguments, chance, by_clock, seconds, operations):
    """Starts a run and kills it at a moment by chance, again if it had ended before; returns the moment."""
    while True:
        if by_clock:
            moment = chance.uniform(0.2, 1.0) * seconds
            pid = start(arguments, "log")
            time.sleep(moment)
            os.kill(pid, signal.SIGKILL)
        else:
            moment = chance.randint(1, operations)
            pid = start(arguments, "log", partial(kill_at, moment))
        if ended(pid) == -signal.SIGKILL:
            return moment
        shutil.rmtree(arguments[-1])


def main():
    folder, seed, moments, arguments = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:]
    os.chdir(folder)
    whole_run(arguments)  # what is slow the first time is not measured
    seconds, operations, adapter = whole_run(arguments)
    print(json.dumps({"sha256": adapter, "seconds": seconds, "operations": operations}), flush=True)
    for number in range(moments):
        output = f"out{number}"
        again = [*arguments, "--output", output]
        chance = random.Random(f"{seed} {number}")
        moment = killed_run(again, chance, number % 2 == 0, seconds, operations)
        left = sorted({path.name for path in Path(output).rglob("*") if path.is_dir()})
        found = checkpoints.checkpoint_dirs(output)
        code = ended(start([*again, "--resume"], "log"))
        log = Path("log").read_text()
        if not found:
            assert "has nothing to resume" in log
            assert code == 1
            code = ended(start(again, "log"))
        assert code == 0, Path("log").read_text()
        extra = [str(path) for path in Path(output).rglob("*.*") if path.suffix in (".part", ".old")]
        line = {"moment": moment, "left": left, "whole": len(found), "extra": extra}
        print(json.dumps({**line, "sha256": sha256(output)}), flush=True)
        shutil.rmtree(output)


if __name__ == "__main__":
    main()
