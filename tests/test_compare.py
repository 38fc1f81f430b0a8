"""The verdict: what counts as a call, the counts, and what a missing adapter says."""

import subprocess
import sys
from pathlib import Path

import pytest
from test_examples import normalised

import chat_rows
import compare

ROOT = Path(__file__).resolve().parent.parent
CALL = compare.CALL


@pytest.mark.parametrize(
    ("text", "ended", "needs_call", "reason"),
    [
        (CALL, True, True, None),
        (CALL, False, True, "did not end within 80 tokens"),
        (CALL + " ", True, True, "malformed call"),
        ("Вот: " + CALL, True, True, "malformed call"),
        (CALL + CALL, True, True, "malformed call"),
        ("Ваш баланс 100 рублей.", True, True, "no call"),
        ("", True, True, "no call"),
        ("Здравствуйте!", True, False, None),
        ("Здравствуйте!", False, False, "did not end within 80 tokens"),
        (CALL, True, False, "false call"),
        ("Секунду <tool_call", True, False, "false call"),
        (" \n", True, False, "empty answer"),
    ],
)
def test_a_call_counts_only_if_it_is_the_whole_answer(text, ended, needs_call, reason):
    assert compare.fault(text, ended, needs_call) == reason


def test_the_counts_of_a_table_worked_out_by_hand():
    answers = [
        (CALL, True),
        (CALL, True),
        (CALL + "!", True),
        ("нет", True),
        ("да", True),
        (CALL, True),
        ("я", False),
    ]
    needed = [True, True, True, True, False, False, False]
    assert compare.count(answers, needed) == {
        "needed": 4,
        "right": 2,
        "missed": 2,
        "malformed": 1,
        "general": 3,
        "false": 1,
        "f1": pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)),
    }
    assert compare.count([("нет", True)], [True])["f1"] == 0.0


def test_no_probe_stands_in_the_rows():
    prompts = {
        normalised(row["messages"][0]["content"])
        for path in ("examples.json", "heldout.json")
        for _, row in chat_rows.read(ROOT / path)
    }
    assert [need for _, need in compare.PROBES] == [True] * 4 + [False] * 2
    assert not {normalised(prompt) for prompt, _ in compare.PROBES} & prompts


def test_a_missing_adapter_is_one_line_and_exit_2(tmp_path):
    (tmp_path / "heldout.json").write_bytes((ROOT / "heldout.json").read_bytes())
    result = subprocess.run(
        [sys.executable, ROOT / "compare.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr == "qlora_output holds no adapter; train one first: python train_qlora.py\n"
