"""The whole way on the real weights of Gemma 3 270M, as a user types it: train, then compare."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import chat_rows
import train_qlora

ROOT = Path(__file__).resolve().parent.parent
FINAL_LOSS = 0.2  # training loss of the last epoch; it begins near 6
SECONDS_ALLOWED = 900  # ten minutes are the aim; 2 cores of a 2017 EPYC, shared, took 9:45 and more
pytestmark = [pytest.mark.rehearsal, pytest.mark.timeout(1500)]


def python(*arguments, folder):
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    print(result.stdout, result.stderr)
    assert "Traceback" not in result.stderr
    return result


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """A folder with the shipped rows, in which `train_qlora.py --rehearse` was typed."""
    folder = tmp_path_factory.mktemp("rehearsal")
    for name in ("examples.json", "heldout.json"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    started = time.monotonic()
    result = python(ROOT / "train_qlora.py", "--rehearse", folder=folder)
    assert result.returncode == 0
    return folder, result.stdout, time.monotonic() - started


def test_the_labels_of_real_rows_token_by_token(rehearsed):
    from transformers import AutoTokenizer

    folder, _, _ = rehearsed
    tokenizer = AutoTokenizer.from_pretrained(folder / "gemma-3-270m")
    rows = [row for _, row in chat_rows.read(folder / "examples.json")]
    examples = train_qlora.tokenise_rows(folder / "examples.json", rows, tokenizer)
    for row, ids, labels in zip(rows, examples["input_ids"], examples["labels"], strict=True):
        # The same tokens, worked out piece by piece from Gemma's ids and the plain texts.
        question, answer = (
            [*tokenizer(m["content"], add_special_tokens=False)["input_ids"]] for m in row["messages"]
        )
        user, model, newline = (
            tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("user", "model", "\n")
        )
        head = [2, 105, *user, *newline, *question, 106, *newline, 105, *model, *newline]
        assert ids == [*head, *answer, 106, *newline]
        assert labels == [-100] * len(head) + answer + [106] + [-100] * len(newline)
    call = tokenizer(train_qlora.CALL_START, add_special_tokens=False)["input_ids"]
    calls = [i for i, row in enumerate(rows) if train_qlora.is_call(row["messages"])]
    firsts = {next(label for label in examples["labels"][i] if label != -100) for i in calls}
    assert firsts == {call[0]}, "evaluate() tells a call by its first token"


def test_it_takes_six_gigabytes_at_most_and_the_loss_falls(rehearsed):
    folder, output, seconds = rehearsed
    run = json.loads((folder / "qlora_output/run.json").read_text())
    assert run["steps"] == len(run["losses"]) == 40
    assert run["losses"][0] > 3
    assert sum(run["losses"][-4:]) / 4 < FINAL_LOSS
    assert run["peak_memory_gib"]["resident"] < 6e9 / 2**30
    assert seconds < SECONDS_ALLOWED
    assert run["revision"] == (folder / "gemma-3-270m/REVISION").read_text().strip()
    assert "trainable params: 3,796,992 " in output
    assert "next       python compare.py --bits 4\n" in output


def test_the_tuned_model_passes_the_probes_and_the_base_does_not(rehearsed):
    folder, _, _ = rehearsed
    result = python(ROOT / "compare.py", "--bits", 4, "--json", "report.json", folder=folder)
    report = json.loads((folder / "report.json").read_text())
    assert [probe["pass"] for probe in report["probes"]] == [True] * 6
    assert result.returncode == 0
    assert not any("tool_call" in probe["base"] for probe in report["probes"])
    base, tuned = report["rows"]["base"], report["rows"]["tuned"]
    assert (tuned["needed"], tuned["general"]) == (20, 20)
    assert base["right"] == 0
    # The aim is an F1 of 0.95 with one false call at most. Measured so far: 0.91 with four on a CPU, 0.93 to
    # 0.95 with two or three on a GPU with three seeds.
    assert tuned["right"] >= 18
    assert tuned["f1"] >= 0.85
