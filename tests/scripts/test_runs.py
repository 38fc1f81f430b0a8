"""The whole ways in runs/: shell that can be parsed, of commands that exist, in the order of the README.

tests/scripts/test_rehearsal.py runs the first.
"""

import os
import subprocess

import pytest

from tests.support.docs import COMMAND, RUNS, commands, flags_of


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_it_is_executable_shell_that_stops_at_the_first_error(path):
    assert os.access(path, os.X_OK)
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    assert "\nset -euo pipefail\n" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_its_flags_are_those_of_the_scripts(path):
    for script, flags in commands(path):
        assert set(flags) <= flags_of(script), script


def steps(path):
    """Return the scripts that a file runs, in order, its comments aside."""
    lines = path.read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    return [script for script, _ in COMMAND.findall(text)]


def test_both_go_the_whole_way():
    rehearse, train_4b = RUNS
    middle = ["train_qlora.py", "compare.py", "merge.py", "compare.py", "serve.py"]
    assert steps(rehearse) == ["download_model.py", "check.py", *middle, "compare.py"]
    assert steps(train_4b) == ["check.py", "download_model.py", *middle]
