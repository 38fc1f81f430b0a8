"""compare.py: what it prints and writes, its verdict, and what a user can fix."""

import contextlib
import json
import os
import re
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
        generation, "answer_all", lambda model, tokenizer, asked, title, limits: answers[title.strip()]
    )

    arguments = ("--adapter", adapter, "--data", "mine.json")
    code, output, error = run_main(compare.main, *arguments, "--json", "report.json", folder=tmp_path)
    assert (code, error) == (0, "")
    lines = [line for line in output.splitlines() if "pytest-" not in line]  # its folders' long names
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in output
    few = "rows       mine.json: 4 unseen rows, fewer than 10; judged by the probes alone"
    assert f"\n{few}\nverdict    tuned passes 6 of 6 probes\n" in output
    assert "probe 5    pass\n  seen in training, so its result here says nothing (data leak)\n" in output
    assert "mine.json:4: seen in training" in output
    report = json.loads(Path("report.json").read_text(encoding="utf-8"))
    assert report == json.loads(Path(adapter, "compare.json").read_text(encoding="utf-8"))
    assert [probe["seen"] for probe in report["probes"]] == [False] * 4 + [True, False]
    first = {
        "prompt": PROBES[0][0],
        "line": 1,
        "role": "user",
        "expected": "get_sensitive_data()",
        "tuned": CALL,
        "pass": True,
        "step": None,
        "reason": None,
    }
    assert first.items() <= report["probes"][0].items()
    tuned = report["rows"]["tuned"]
    # Row 1 called rightly, row 2 a false call, row 3 missed, row 4 left out, row 5 (a conversation) missed.
    parts = [tuned["decision"][key]["part"] for key in ("recall", "missed", "false_call_rate")]
    wholes = [tuned["decision"][key]["whole"] for key in ("recall", "missed", "false_call_rate")]
    assert (parts, wholes) == ([1, 2, 1], [3, 3, 1])
    assert [(f["line"], f["step"], f["reason"]) for f in report["rows"]["failing"]] == [
        (2, "decision", "get_sensitive_data, not text"),
        (3, "decision", "text, not get_sensitive_data"),
        (5, "decision", "text, not get_sensitive_data"),
    ]
    assert "\nmine.json:2: decision: get_sensitive_data, not text\n    get_sensitive_data()\n" in output
    assert (report["data"], report["probes_data"]) == ("mine.json", "probes.json")
    assert report["rows"]["base"]["decision"]["recall"]["part"] == 0

    answers["tuned"][2] = answer("Да.")
    code, output, error = run_main(compare.main, *arguments, folder=tmp_path)
    assert (code, error) == (1, "")
    assert "probe 3    FAIL: decision: text, not get_sensitive_data\n" in output
    assert "\nverdict    tuned falls short: 5 of 6 probes pass\n" in output
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

    def answer_all(model, tokenizer, conversations, title, limits):
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


@pytest.mark.usefixtures("passing")
def test_what_is_judged_by_is_carried_on(adapter, tiny_text_model, tmp_path):
    shutil.copytree(adapter, tmp_path / "qlora_output")
    shutil.copytree(tiny_text_model, tmp_path / "merged")
    copy_questions(tmp_path)
    shutil.copy(tmp_path / "probes.json", tmp_path / "my probes.json")
    shutil.copy(tmp_path / "probes.json", tmp_path / "mine.json")
    flags = ["--probes", "my probes.json", "--data", "mine.json", "--min-f1", "0.5"]
    probes = "--probes 'my probes.json'"
    assert next_lines(tmp_path, *flags) == [f"next       python merge.py {probes}"]
    quantized = next_lines(tmp_path, *flags, "--bits", "4")
    assert quantized[0] == f"next       python compare.py {probes} --data mine.json --min-f1 0.5"
    assert quantized[2] == f"           python serve.py --adapter qlora_output --bits 4 {probes}"
    quantized = next_lines(tmp_path, "--max-false-calls", "0", "--bits", "8")
    assert quantized[0] == "next       python compare.py --max-false-calls 0.0"
    merged = next_lines(tmp_path, "--merged", "merged", *flags)
    assert merged == [f"next       python serve.py --model merged {probes}"]


def gate_rows(calls, general):
    return [row(f"Долг {n}?", CALL) for n in range(calls)] + [row(f"Что {n}?", "Да.") for n in range(general)]


@pytest.mark.parametrize(
    ("flags", "short"),
    [
        ([], ["F1 0.64 of 10 calls (at least 0.9: --min-f1)",
              "4 of 10 false calls: 0.40 (at most 0.1: --max-false-calls)"]),
        (["--min-f1", "0.6"], ["4 of 10 false calls: 0.40 (at most 0.1: --max-false-calls)"]),
        (["--max-false-calls", ".4"], ["F1 0.64 of 10 calls (at least 0.9: --min-f1)"]),
        (["--min-f1", "0", "--max-false-calls", "1"], []),
        (["--min-f1", "0.6", "--max-false-calls", "0.39"],
         ["4 of 10 false calls: 0.40 (at most 0.39: --max-false-calls)"]),
    ],
)  # fmt: skip
def test_probes_alone_do_not_pass_where_held_out_rows_fall_short(
    adapter, tmp_path, monkeypatch, flags, short
):
    shutil.copytree(adapter, tmp_path / "qlora_output")
    copy_questions(tmp_path)
    (tmp_path / "heldout.json").write_text("\n".join(map(json.dumps, gate_rows(10, 10))))
    # Of ten calls due, seven are right, one is of another tool and two are missed; of ten general rows four
    # get a call: F1 is 2 · 7 / (10 due + 12 made).
    other = tool_call.format_call("get_rate", {})
    texts = [CALL if need else "Да." for _, need in PROBES]
    texts += [CALL] * 7 + [other] + ["Да."] * 2 + [CALL] * 4 + ["Да."] * 6
    monkeypatch.setattr(generation, "load_tuned", lambda *_: (Loaded(), None, {}))
    monkeypatch.setattr(generation, "answer_all", lambda *_: list(map(answer, texts)))
    code, output, error = run_main(compare.main, *flags, folder=tmp_path)
    assert (code, error) == (int(bool(short)), "")
    (verdict,) = [line for line in output.splitlines() if line.startswith("verdict ")]
    if short:
        assert verdict == f"verdict    tuned falls short: {'; '.join(short)}"
        assert "\nnext " not in output
    else:
        assert verdict == "verdict    tuned passes 6 of 6 probes, F1 0.64 of 10 calls, 4 of 10 false calls"
    report = json.loads((tmp_path / "qlora_output/compare.json").read_text(encoding="utf-8"))
    assert (report["gate"]["short"], report["gate"]["passed"]) == (short, not short)
    assert report["gate"]["reached"]["f1"] == 14 / 22


@pytest.mark.parametrize("value", ["1.1", "-0.1", "nan", "90%", "", "inf", "x\x1b[2J"])
@pytest.mark.parametrize("flag", ["--min-f1", "--max-false-calls"])
def test_what_the_gate_asks_is_a_share(tmp_path, flag, value):
    code, output, error = run_main(compare.main, f"{flag}={value}", folder=tmp_path)
    assert (code, output) == (2, "")
    last = error.splitlines()[-1]
    assert last.startswith(f"compare.py: error: argument {flag}: expected a number from 0 to 1, not ")
    assert last.isprintable()


@pytest.mark.usefixtures("passing")
def test_without_held_out_rows_the_probes_alone_decide(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "qlora_output")
    shutil.copy(ROOT / "probes.json", tmp_path)
    code, output, error = run_main(compare.main, folder=tmp_path)
    assert (code, error) == (0, "")
    none = "rows       heldout.json: no such file; judged by the probes alone"
    assert f"\n{none}\nverdict    tuned passes 6 of 6 probes\n" in output
    assert "6 probes, 0 rows\n" in output
    # The table is that of the probes then: four calls due, two texts.
    assert re.search(r"\nprobes +base +tuned\ndecision +precision +– \(0 of 0\) +4 of 4: 1\.00 ", output)
    report = json.loads((tmp_path / "qlora_output/compare.json").read_text(encoding="utf-8"))
    assert (report["data"], report["gate"]["reached"]["rows"]) == (None, 0)
    assert report["gate"]["asked"] == {"min_f1": None, "max_false_calls": None}
    assert report["gate"]["reached"]["f1"] is None
    for name in ("heldout.json", ""):
        code, output, error = run_main(compare.main, "--data", name, folder=tmp_path, error_code=2)
        assert (code, output) == (2, "")
        assert error.endswith("no such file; name it with --data\n") or not name
    (tmp_path / "heldout.json").symlink_to("gone.json")
    code, _, error = run_main(compare.main, folder=tmp_path, error_code=2)
    assert (code, error.count("\n")) == (2, 1)


def test_faults_of_both_files_are_listed_before_anything_is_loaded(tmp_path):
    (tmp_path / "probes.json").write_text(json.dumps(row("Долг?", "<tool_call name='f'/>")))
    (tmp_path / "rows.json").write_text(json.dumps(row("Долг?", CALL + "<tool_call")))
    code, output, error = run_main(compare.main, "--data", "rows.json", folder=tmp_path, error_code=2)
    assert (code, output) == (2, "")
    assert [line.split(" ")[0] for line in error.splitlines()] == ["probes.json:1:", "rows.json:1:"]


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
    assert output.endswith("verdict    merged falls short: 4 of 6 probes pass\n")
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["merged"], report["rows"]["merged"]["right"]["recall"]["part"]) == ("merged", 1)
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
