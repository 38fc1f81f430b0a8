"""compare.py: what it prints and writes, its verdict, and what a user can fix."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

import compare
from tests.support.rows import PROBES, copy_questions, row
from tests.support.scripts import run_main
from tuner.data import chat_rows, chat_text, tool_call
from tuner.inference import generation
from tuner.inference.judging import Answer
from tuner.system import commands

ROOT = Path(__file__).resolve().parents[2]
CALL = tool_call.format_call("get_sensitive_data", {})


def answer(text, ended=True):
    return Answer(text, ended, [])


def test_a_comparison_shows_and_writes_everything(adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    rows = [row for _, row in chat_rows.read_rows(ROOT / "heldout.json")][:4]
    rows.append({"messages": [*rows[1]["messages"], *rows[0]["messages"]]})
    Path("mine.json").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    copy_questions(tmp_path)
    seen = [chat_text.fingerprint(rows[3]["messages"][:-1])]
    seen.append(chat_text.fingerprint([{"role": "user", "content": "ЧТО ТАКОЕ,  кредитный лимит"}]))
    Path(adapter, "run.json").write_text(json.dumps({"prompts_sha256": seen}))
    answers = {"tuned": [answer(CALL)] * 4 + [answer("Это \x1b[31mсумма.")] * 2 + [answer(CALL)] * 2}
    answers["tuned"] += [answer("Нет.")] * 3
    answers["base"] = [answer("не знаю, " * 30, False)] * 11
    monkeypatch.setattr(
        generation, "answer_all", lambda model, tokenizer, conversations, title: answers[title.strip()]
    )

    arguments = ("--adapter", adapter, "--data", "mine.json")
    code, output, error = run_main(compare.main, *arguments, "--json", "report.json", folder=tmp_path)
    assert (code, error) == (0, "")
    lines = [line for line in output.splitlines() if "pytest-" not in line]  # its folders' long names
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in output
    assert "verdict    tuned passes 6 of 6 probes" in output
    assert "probe 5    pass\n  seen in training, so its result here says nothing (data leak)\n" in output
    assert "mine.json:4: seen in training" in output
    report = json.loads(Path("report.json").read_text(encoding="utf-8"))
    assert report == json.loads(Path(adapter, "compare.json").read_text(encoding="utf-8"))
    assert [probe["seen"] for probe in report["probes"]] == [False] * 4 + [True, False]
    first = {
        "prompt": PROBES[0][0],
        "expected": "a call",
        "tuned": CALL,
        "pass": True,
        "reason": None,
    }
    assert first.items() <= report["probes"][0].items()
    tuned = report["rows"]["tuned"]
    # Row 1 called rightly, row 2 a false call, row 3 missed, row 4 left out, row 5 (a conversation) missed.
    assert [tuned[k] for k in ("needed", "right", "missed", "general", "false")] == [3, 1, 2, 1, 1]
    assert [(f["line"], f["kind"]) for f in report["rows"]["failing"]] == [
        (2, "false"),
        (3, "missed"),
        (5, "missed"),
    ]

    answers["tuned"][2] = answer("Да.")
    code, output, error = run_main(compare.main, *arguments, folder=tmp_path)
    assert (code, error) == (1, "")
    assert "probe 3    FAIL: no call" in output
    assert "next " not in output
    Path(adapter, "run.json").unlink()


def test_what_a_user_can_fix_is_one_line_and_exit_2(tmp_path):
    copy_questions(tmp_path)
    for name in (
        "torch",
        "transformers",
        "datasets",
        "bitsandbytes",
        "peft",
    ):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')")
    result = subprocess.run(
        [sys.executable, ROOT / "compare.py"],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    message = "qlora_output does not exist; train an adapter first: python train_qlora.py\n"
    assert (result.returncode, result.stderr) == (2, message)

    def run(*arguments):
        return run_main(compare.main, *arguments, folder=tmp_path, error_code=2)

    assert run() == (2, "", message)
    assert run("--bits", "3")[0] == 2
    code, _, error = run("--data", "none.json")
    assert (code, error) == (2, "none.json: no such file; name it with --data\n")
    for report in ("no/report.json", "."):
        code, _, error = run("--json", report)
        assert (code, error.count("\n")) == (2, 1)
        assert "folder" in error


class Loaded:
    """A model as generation.load_tuned returns it; the answers come from elsewhere."""

    device = torch.device("cpu")
    peft_config: ClassVar = {"default": SimpleNamespace(base_model_name_or_path="google/gemma\x1b[2J\n")}

    def disable_adapter(self):
        return contextlib.nullcontext()


@pytest.fixture
def passing(monkeypatch):
    """Let every model that is loaded answer as it should, but for the base."""

    def answer_all(model, tokenizer, conversations, title):
        due = [probe[1] for probe in PROBES] + [False] * (len(conversations) - len(PROBES))
        return [answer(CALL if call and title != "base " else "Да.") for call in due]

    monkeypatch.setattr(generation, "load_tuned", lambda *_: (Loaded(), None, {}))
    monkeypatch.setattr(generation, "load_model", lambda *_: (Loaded(), None))
    monkeypatch.setattr(generation, "answer_all", answer_all)


def next_lines(folder, *arguments):
    copy_questions(folder)
    (folder / "heldout.json").write_text(json.dumps(row("Сколько будет два и два?", "Четыре.")))
    code, output, error = run_main(compare.main, *arguments, folder=folder, error_code=2)
    assert (code, error) == (0, "")
    assert all(line.isprintable() for line in output.splitlines())
    return output.split("of 6 probes\n")[1].splitlines()


@pytest.mark.usefixtures("passing")
@pytest.mark.parametrize("name", ["qlora_output", "it's my\nrun", "-x"])
def test_a_verdict_leads_on_to_what_was_judged(adapter, tiny_text_model, tmp_path, name):
    shutil.copytree(adapter, tmp_path / name)
    shutil.copytree(tiny_text_model, tmp_path / "merged model")
    flags = [] if name == "qlora_output" else [f"--adapter={name}"]
    given = commands.command("x", adapter=name).removeprefix("python x")
    default = "" if name == "qlora_output" else given
    assert next_lines(tmp_path, *flags) == [f"next       python merge.py{default}"]
    in_four_bits = [
        f"next       python compare.py{default}",
        "           on the unquantized base, as merge.py merges it; or serve what was judged:",
        f"           python serve.py{given} --bits 4",
    ]
    assert next_lines(tmp_path, *flags, "--bits", "4") == in_four_bits
    verdict = json.loads((tmp_path / name / "compare.json").read_text())
    assert (verdict["bits"], verdict["passed"]) == (4, 6)
    named = next_lines(tmp_path, *flags, "--base", "my base")
    assert named == [f"next       python merge.py{default} --base 'my base'"]
    merged = ["--merged", "merged model", "--bits", "8"]
    assert next_lines(tmp_path, *merged) == ["next       python serve.py --model 'merged model' --bits 8"]
    assert json.loads((tmp_path / name / "compare.json").read_text())["bits"] is None


def test_a_merged_model_is_judged_and_the_rows_it_was_trained_on_are_left_out(
    tiny_text_model, tmp_path, monkeypatch
):
    folder = Path(shutil.copytree(tiny_text_model, tmp_path / "merged"))
    rows = [row("Сколько будет два и два?", "Четыре."), row("Какой у меня долг?", CALL)]
    (tmp_path / "mine.json").write_text("\n".join(map(json.dumps, rows)))
    copy_questions(tmp_path)
    seen = [chat_text.fingerprint(rows[0]["messages"][:-1])]
    (folder / "run.json").write_text(json.dumps({"prompts_sha256": seen}))
    monkeypatch.setattr(generation, "answer_all", lambda *_: [answer(CALL)] * 8)
    arguments = ("--merged", "merged", "--data", "mine.json", "--json", "report.json")
    code, output, error = run_main(compare.main, *arguments, folder=tmp_path)
    assert (code, error) == (1, "")
    assert output.startswith("merged merged unquantized: 6 probes, 2 rows\n")
    assert "mine.json:1: seen in training" in output
    assert output.endswith("verdict    merged passes 4 of 6 probes\n")
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["merged"], report["rows"]["merged"]["right"]) == ("merged", 1)
    assert not list(tmp_path.rglob("compare.json"))


def test_what_is_no_merged_model_is_one_line(adapter, tiny_text_model, tmp_path):
    copy_questions(tmp_path)
    cut = Path(shutil.copytree(tiny_text_model, tmp_path / "cut"))
    (cut / "tokenizer.json").unlink()

    def refused(*flags):
        code, output, error = run_main(compare.main, *flags, folder=tmp_path, error_code=2)
        assert (code, output) == (2, "")
        return error

    assert refused("--merged", "nope") == "nope does not exist; create it: python merge.py\n"
    assert refused("--merged", "x" * 5000).endswith("x does not exist; create it: python merge.py\n")
    assert f"compare it with its base: python compare.py --adapter {adapter}\n" in refused(
        "--merged", adapter
    )
    assert "cut is not a complete model folder (tokenizer.json missing)" in refused("--merged", "cut")
    for flags in (["--adapter", "a"], ["--base", "a"], ["--endpoint", "http://h/v1"], ["--model", "a"]):
        assert refused("--merged", "m", *flags).splitlines()[-1].startswith("compare.py: error: --")


def test_another_base_can_be_named(adapter, tmp_path):
    copy_questions(tmp_path)
    flags = ("--adapter", adapter, "--base", "./none")
    code, _, error = run_main(compare.main, *flags, folder=tmp_path, error_code=2)
    assert (code, error.split(";")[0]) == (2, "./none does not exist")


def test_full_memory_is_one_line_with_its_cure(adapter, tmp_path, monkeypatch):
    class OutOfMemoryError(RuntimeError):
        pass

    def full(*_):
        raise OutOfMemoryError("CUDA out of memory …")

    monkeypatch.setattr(generation, "load_model", full)
    copy_questions(tmp_path)
    options = {"error_code": 2, "out_of_memory": compare.OUT_OF_MEMORY}
    code, _, error = run_main(compare.main, "--adapter", adapter, folder=tmp_path, **options)
    assert (code, error) == (2, f"GPU out of memory; {compare.OUT_OF_MEMORY}\n")
    assert "--bits 4" in compare.OUT_OF_MEMORY
