"""Run merge.py as a user does, and say what it must have come to."""

import merge
from tests.support.scripts import run_main


def run(adapter, output, *flags):
    """Run merge.py; return (exit code, stdout, stderr)."""
    return run_main(merge.main, "--adapter", adapter, "--output", output, *flags)


def run_well(adapter, output, *flags):
    """Run merge.py, which must end well and quietly; return stdout."""
    code, stdout, stderr = run(adapter, output, *flags)
    assert (code, stderr) == (0, "")
    return stdout


def refused(result, text):
    """Assert that a run ended in one line on stderr that has `text`."""
    code, _, stderr = result
    assert code == 1
    assert text in stderr
    assert len(stderr.splitlines()) == 1
