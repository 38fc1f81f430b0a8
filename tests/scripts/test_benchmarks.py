"""The benchmark runs small on a CPU, so it does not rot; its figures are worked out by hand."""

import json
import re
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import run, verdict
from tests.support import fork_server
from tests.support.scripts import run_main
from train_qlora import RECIPE, preprocess_function
from tuner.data import batching, splitting
from tuner.training import cuda_graphs, memory_plan

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    """Let the benchmark's runs be forks: they import nothing again."""
    monkeypatch.setattr(run.subprocess, "run", fork_server.run_command)


def test_on_a_cpu_it_trains_and_writes_its_table(tiny_text_model, few_rows, tmp_path):
    flags = ["--model", tiny_text_model, "--data", few_rows, "--epochs", 2]
    code, output, errors = run_main(run.main, *flags, "--results", tmp_path / "results.md", folder=tmp_path)
    assert code == 0, output + errors
    assert "TRL, 16×1, checkpointing: its kernels need a GPU" in output
    begin, *lines, end = (tmp_path / "results.md").read_text().splitlines()
    assert (begin, end) == ("<!-- benchmark short: begin -->", "<!-- benchmark short: end -->")
    assert lines[0] == "## 4 steps of 16 rows on the CPU"
    assert re.fullmatch(r"- this project: .*transformers \d.*", lines[2])
    assert re.match(r"\| this project, on a CPU \| 4 \| \d+\.\d{3} \(", lines[-1])
    assert lines[-1].count("|") == lines[4].count("|") == 9
    assert [path.name for path in tmp_path.iterdir()] == ["results.md"]


def test_without_a_result_nothing_is_written(few_rows, tmp_path):
    flags = ["--model", "none", "--data", few_rows]
    for results, code in ((tmp_path / "results.md", 1), (tmp_path / "no/results.md", 2)):
        ended, output, errors = run_main(run.main, *flags, "--results", results, folder=tmp_path)
        assert ended == code
        assert "Traceback" not in output + errors
    assert not list(tmp_path.iterdir())


def test_each_of_the_two_tables_of_the_document_is_replaced_alone():
    document = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    changed = document
    for kind in ("short", "long"):
        changed = run.replace_section(changed, kind, [f"new {kind}"])
        changed = run.replace_section(changed, kind, [f"newer {kind}", "of two lines"])
    for kind in ("short", "long"):
        begin, end = (f"<!-- benchmark {kind}: {word} -->\n" for word in ("begin", "end"))
        before, rest = document.split(begin)
        section, after = rest.split(end)
        assert section.startswith("## ")
        document = before + begin + f"newer {kind}\nof two lines\n" + end + after
    assert changed == document


def test_seconds_ratios_and_rates_are_those_of_the_steps():
    def result(first, other, trained):
        return {
            "step_seconds": [first, other, other, other],
            "command": 30.4,
            "peak_memory_gib": {"allocated": 3.5, "reserved": 4.25},
            "trained_tokens": trained,
        }

    ours, trl = result(2.0, 0.5, 100), result(3.0, 1.0, 100)
    rows = [("ours", 4, ours), ("TRL, 16×1, checkpointing", 4, trl), ("ours", 8, ours)]
    lines = run.table(rows, epochs=7)
    assert lines[2] == "| ours | 4 | 0.500 (2.00) | 3.5 | 1.7 | 30 | 3.50 / 4.25 | 200 |"
    assert lines[3].startswith("| TRL, 16×1, checkpointing | 4 | 1.000 (3.00) | 6.0 | 1.0 |")
    assert lines[4].startswith("| ours | 8 | 0.500 (2.00) | 3.5 | – |")


def test_long_rows_are_as_long_as_they_should_be_and_little_of_them_is_padding(tokenizer):
    made = run.long_rows(400, tokenizer)
    assert made == run.long_rows(400, tokenizer)
    examples = preprocess_function({"messages": [row["messages"] for row in made]}, tokenizer)
    sizes = [len(ids) for ids in examples["input_ids"]]
    assert run.SHORTEST * 0.7 <= min(sizes) < 60
    assert run.LONGEST * 0.8 < max(sizes) <= RECIPE.max_tokens
    assert max(sizes) > 5 * statistics.median(sizes)
    rows = [{"input_ids": range(size), "labels": []} for size in sizes] * 12  # some 5,000
    budget = run.OURS["long"][0][1] * 2**30
    tokens = memory_plan.make_plans(memory_plan.GEMMA_3_4B, 4, 16, budget, 128, max(sizes))[0].tokens
    order = splitting.epoch_batches(range(len(rows)), 1, RECIPE)
    alone = SimpleNamespace(num_processes=1, process_index=0)
    packs = [
        pack for step in order for pack in memory_plan.split_packs([rows[i] for i in step], tokens, alone)[0]
    ]
    packs = [batching.total_tokens(pack) for pack in packs]
    lengths = cuda_graphs.choose_length_buckets(packs)
    padded = sum(min(length for length in lengths if length >= size) for size in packs)
    assert sum(sizes) * 12 == sum(packs)
    assert padded < 1.05 * sum(packs)


def test_a_verdict_over_seeds_trains_and_judges_each_and_writes_its_table(
    tiny_text_model, few_rows, tmp_path
):
    flags = ["--model", tiny_text_model, "--data", few_rows, "--epochs", 1, "--seeds", 2]
    flags += ["--set", f"mine={few_rows}", "--json", tmp_path / "verdict.json"]
    results = tmp_path / "results.md"
    code, output, errors = run_main(verdict.main, *flags, "--results", results, folder=tmp_path)
    assert code in (0, None), output + errors
    seeds = json.loads((tmp_path / "verdict.json").read_text())
    assert [one["seed"] for one in seeds] == [1, 2]
    rows = len(Path(few_rows).read_text().splitlines())
    for one in seeds:
        assert (one["sets"]["mine"]["rows"], one["sets"]["probes"]["rows"]) == (rows, 6)
    lines = results.read_text().splitlines()
    assert lines[1] == "## 2 seeds, 4 bits, 5 steps on the CPU"
    assert [line.split(" | ")[0] for line in lines[-3:-1]] == ["| probes", "| mine"]


def test_of_several_seeds_median_and_range_are_told():
    def figures(f1, false, missed, passed):
        part = {"whole": 4}
        decision = {"false_call_rate": {"part": false, **part}, "missed": {"part": missed, **part}}
        return {"right": {"f1": {"value": f1}}, "decision": decision, "passed": passed, "rows": 8}

    seeds = [
        {"sets": {"hard": one}}
        for one in (figures(0.5, 1, 2, 5), figures(None, 0, 4, 4), figures(1, 3, 0, 8))
    ]
    assert all((ROOT / path).is_file() for path in verdict.SETS.values())
    assert verdict.table(seeds)[2:] == [
        "| hard | 0.50 (0.00–1.00) | 1 (0–3) of 4 | 2 (0–4) of 4 | 5 (4–8) of 8 |"
    ]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--seeds", "0"], "--seeds: expected a whole number ≥ 1"),
        (["--set", "rows.jsonl"], "expected NAME=FILE"),
        (["--json", "no/verdict.json"], "the folder of no/verdict.json does not exist"),
    ],
)
def test_wrong_flags_of_the_verdict_are_told_before_anything_is_trained(tmp_path, flags, says):
    code, _, errors = run_main(verdict.main, *flags, folder=tmp_path)
    assert code == 2
    assert says in errors
