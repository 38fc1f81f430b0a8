"""The benchmark runs small on a CPU, so it does not rot; what it makes of numbers is worked out by hand."""

import subprocess
import sys
from pathlib import Path

from benchmarks import run

ROOT = Path(__file__).resolve().parent.parent


def test_on_a_cpu_it_trains_and_writes_its_table(tiny_text_model, few_rows, tmp_path):
    result = subprocess.run(
        [
            *(sys.executable, ROOT / "benchmarks/run.py", "--model", tiny_text_model, "--data", few_rows),
            *("--epochs", "2", "--results", tmp_path / "results.md"),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "TRL, 16×1, checkpointing: its kernels need a GPU" in result.stdout
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert lines[0] == "# 4 steps of 16 rows on the CPU"
    assert "transformers" in lines[2]
    assert lines[-1].startswith("| this project, on a CPU | 4 | 0.")
    assert lines[-1].count("|") == lines[4].count("|") == 9
    assert [path.name for path in tmp_path.iterdir()] == ["results.md"]


def test_seconds_ratios_and_rates_are_those_of_the_steps():
    def result(first, other, trained):
        return {
            "step_seconds": [first, other, other, other],
            "command": 30.4,
            "peak_memory_gib": {"allocated": 3.5, "reserved": 4.25},
            "trained_tokens": trained,
        }

    ours, theirs = result(2.0, 0.5, 100), result(3.0, 1.0, 100)
    rows = [("ours", 4, ours), (run.PEERS["trl"], 4, theirs), ("ours", 8, ours)]
    lines = run.table(rows, epochs=7)
    assert lines[2] == "| ours | 4 | 0.500 (2.00) | 3.5 | 1.7 | 30 | 3.50 / 4.25 | 200 |"
    assert lines[3].startswith("| TRL, 16×1, checkpointing | 4 | 1.000 (3.00) | 6.0 | 1.0 |")
    assert lines[4].startswith("| ours | 8 | 0.500 (2.00) | 3.5 | – |")
