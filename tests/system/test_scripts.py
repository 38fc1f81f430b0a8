"""What all scripts do alike: exit codes, and what is printed where a user can fix something."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.scripts import run_main
from tuner.system.errors import UserError, rows_error

ROOT = Path(__file__).resolve().parents[2]


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


def raising(error):
    def main():
        print("begun")
        if error:
            raise error

    return main


@pytest.mark.parametrize(
    ("error", "options", "code", "says"),
    [
        (None, {}, 0, ""),
        (UserError("rows.json: no such file"), {}, 1, "rows.json: no such file\n"),
        (UserError("a"), {"error_code": 2}, 2, "a\n"),
        (UserError("a\x1b[2J\n\udcffb: no"), {}, 1, "a\ufffd[2J \ufffdb: no\n"),
        (rows_error("r.json", [(3, "x"), (5, "y")]), {}, 1, "r.json:3: x\nr.json:5: y\n"),
        (rows_error("r\n.json", [(3, "x\x07"), (5, "y")]), {}, 1, "r .json:3: x\ufffd\nr .json:5: y\n"),
        (KeyboardInterrupt(), {}, 130, "\nstopped\n"),
        (KeyboardInterrupt(), {"interrupted": "nothing was kept"}, 130, "\nnothing was kept\n"),
        (OutOfMemoryError(), {}, 1, "GPU out of memory; close what else runs on the GPU (nvidia-smi)\n"),
        (
            OutOfMemoryError(),
            {"out_of_memory": "add --bits 4", "error_code": 2},
            2,
            "GPU out of memory; add --bits 4\n",
        ),
    ],
)
def test_an_exception_becomes_a_line_and_an_exit_code(error, options, code, says):
    assert run_main(raising(error), **options) == (code, "begun\n", says)


def test_what_main_returns_is_the_exit_code_and_bugs_keep_their_traceback():
    assert run_main(lambda: 3)[0] == 3
    for error in (RuntimeError("a"), ValueError("b")):
        with pytest.raises(type(error)):
            run_main(raising(error))


def test_only_the_main_process_prints_an_error(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run_main(raising(UserError("a"))) == (1, "begun\n", "")


def test_a_closed_pipe_ends_a_script_without_a_traceback():
    code = "import sys; from tuner.system.scripts import run_script\n"
    code += "run_script(lambda: (sys.stdin.read(), print('x' * 10**6, flush=True)))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 1
