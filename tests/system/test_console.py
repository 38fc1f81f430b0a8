"""What is printed is safe to print, and ends nothing where nobody reads it any more."""

import subprocess
import sys
from pathlib import Path

import pytest

from tuner.system import console
from tuner.system.console import printable

ROOT = Path(__file__).resolve().parents[2]


def test_printable_text_is_one_line_without_control_characters():
    assert printable("a\x1b[31mb\nc\u202ed") == "a\ufffd[31mb c\ufffdd"
    assert len(printable("ж" * 100)) == 60
    assert printable("می\u200cخواهم 👨\u200d👩") == "می\u200cخواهم 👨\u200d👩"


@pytest.mark.parametrize(
    ("terminal", "no_color", "shown"), [(True, "", "\x1b[32mа\x1b[0m"), (True, "1", "а"), (False, "", "а")]
)
def test_colors_are_for_terminals_that_want_them(monkeypatch, terminal, no_color, shown):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("NO_COLOR", no_color)
    assert console.colorize("а", 32) == shown
    assert console.has_colors() == (shown != "а")


def test_only_the_main_process_prints(monkeypatch, capsys):
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        console.print_main(f"rank {rank}\x1b")
    assert capsys.readouterr().out == "rank 0\ufffd\n"


@pytest.mark.parametrize(("ignore", "says"), [("console.ignore_broken_pipes()", "end"), ("", "BrokenPipe")])
def test_a_closed_pipe_ends_nothing_where_it_is_ignored(ignore, says):
    code = f"import sys; from tuner.system import console; {ignore}\n"
    code += "sys.stdin.read(); print('x' * 10**6, flush=True); sys.stderr.write('end')"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdout.close()
    process.stdin.close()
    assert says in process.stderr.read()
    process.stderr.close()
    process.wait()
