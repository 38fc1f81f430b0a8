"""The benchmark runs small on a CPU, so it does not rot; what it makes of numbers is worked out by hand."""

import re
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import train_qlora
from benchmarks import run
from tuner.data import batching
from tuner.training import cuda_graphs, memory_plan

ROOT = Path(__file__).resolve().parents[2]


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
    assert re.fullmatch(r"- this project: .*transformers \d.*", lines[2])
    assert re.match(r"\| this project, on a CPU \| 4 \| \d+\.\d{3} \(", lines[-1])
    assert lines[-1].count("|") == lines[4].count("|") == 9
    assert [path.name for path in tmp_path.iterdir()] == ["results.md"]


def test_without_a_result_nothing_is_written(few_rows, tmp_path):
    command = [sys.executable, ROOT / "benchmarks/run.py", "--model", "none", "--data", few_rows]
    for results, code in ((tmp_path / "results.md", 1), (tmp_path / "no/results.md", 2)):
        result = subprocess.run(
            [*command, "--results", results], capture_output=True, text=True, cwd=tmp_path
        )
        assert result.returncode == code
        assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_seconds_ratios_and_rates_are_those_of_the_steps():
    def result(first, other, trained):
        return {
            "step_seconds": [first, other, other, other],
            "command": 30.4,
            "peak_memory_gib": {"allocated": 3.5, "reserved": 4.25},
            "trained_tokens": trained,
        }

    ours, theirs = result(2.0, 0.5, 100), result(3.0, 1.0, 100)
    rows = [("ours", 4, ours), ("TRL, 16×1, checkpointing", 4, theirs), ("ours", 8, ours)]
    lines = run.table(rows, epochs=7)
    assert lines[2] == "| ours | 4 | 0.500 (2.00) | 3.5 | 1.7 | 30 | 3.50 / 4.25 | 200 |"
    assert lines[3].startswith("| TRL, 16×1, checkpointing | 4 | 1.000 (3.00) | 6.0 | 1.0 |")
    assert lines[4].startswith("| ours | 8 | 0.500 (2.00) | 3.5 | – |")


def test_long_rows_are_as_long_as_they_are_said_to_be_and_little_of_them_is_padding(tokenizer):
    made = run.long_rows(400, tokenizer)
    assert made == run.long_rows(400, tokenizer)
    examples = train_qlora.preprocess_function({"messages": [row["messages"] for row in made]}, tokenizer)
    sizes = [len(ids) for ids in examples["input_ids"]]
    assert run.SHORTEST * 0.7 <= min(sizes) < 60
    assert run.LONGEST * 0.8 < max(sizes) <= train_qlora.MAX_TOKENS
    assert max(sizes) > 5 * statistics.median(sizes)
    rows = [{"input_ids": range(size), "labels": []} for size in sizes] * 12  # some 5,000
    budget = run.OURS["long"][0][1] * 2**30
    tokens = memory_plan.make_plans(memory_plan.GEMMA_3_4B, 4, 16, budget, 128, max(sizes))[0].tokens
    order = train_qlora.steps_of(1, range(len(rows)))
    alone = SimpleNamespace(num_processes=1, process_index=0)
    packs = [
        pack for step in order for pack in memory_plan.split_packs([rows[i] for i in step], tokens, alone)[0]
    ]
    packs = [batching.total_tokens(pack) for pack in packs]
    lengths = cuda_graphs.choose_length_buckets(packs)
    padded = sum(min(length for length in lengths if length >= size) for size in packs)
    assert sum(sizes) * 12 == sum(packs)
    assert padded < 1.05 * sum(packs)
