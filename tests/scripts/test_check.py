"""check.py as a user runs it: what it says of rows, labels, plan, cost and access, and how it exits."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import check
import compare
import train_qlora
from tests.support.rows import CALL, row
from tests.support.scripts import run_main
from train_qlora import RECIPE, preprocess_function
from tuner.data import chat_rows, labels, row_warnings, splitting, tokenized, tool_call
from tuner.system.errors import UserError
from tuner.training import run_plan
from tuner.training.memory_plan import GEMMA_3_4B, Workload

ROOT = Path(__file__).resolve().parents[2]


def test_the_rows_shown_are_a_call_a_general_and_the_longest_or_those_asked_for():
    rows = [(2, row("а", CALL)), (3, row("б", CALL)), (5, row("в", "Да.")), (9, row("г" * 50, "Да."))]
    counts = [(10, 5), (10, 5), (8, 2), (60, 2)]
    assert [line for line, _ in check.choose_rows(rows, counts, None)] == [2, 5, 9]
    assert [line for line, _ in check.choose_rows(rows, counts, [3, 9])] == [3, 9]
    assert check.choose_rows(rows, counts, "all") == rows
    with pytest.raises(UserError, match="no row begins on line 4"):
        check.choose_rows(rows, counts, [3, 4])


def test_the_plan_is_what_training_does(tokenizer):
    path = ROOT / "examples.json"
    rows = chat_rows.read_rows(path)
    counts = labels.count_tokens(rows, tokenizer, preprocess_function)
    plan = run_plan.plan_run(rows, counts, RECIPE)
    assert list(run_plan.warn_of_plan(plan, RECIPE)) == []
    assert (plan.training, len(plan.validation), plan.steps, plan.warmup) == (180, 20, 120, 10)
    messages = [r for _, r in rows]
    examples = tokenized.tokenize_rows(path, messages, tokenizer, preprocess_function, RECIPE.max_tokens)
    assert counts == [(len(e["labels"]), sum(x != -100 for x in e["labels"])) for e in examples]
    training, validation = splitting.split_rows(messages, RECIPE)
    assert plan.validation == [CALL in messages[i]["messages"][-1]["content"] for i in validation]
    lengths = [len(ids) for ids in examples["input_ids"]]
    batches = splitting.epoch_batches(training, 1, RECIPE)
    assert plan.workload.steps == [[lengths[i] for i in batch] for batch in batches]
    assert (plan.workload.longest, plan.workload.total) == (max(lengths), sum(lengths))
    assert plan.workload.trained == sum(trained for _, trained in counts)


@pytest.mark.parametrize(
    ("model", "data", "command"),
    [
        ("google/gemma-3-4b-it", "examples.json", "python download_model.py && python train_qlora.py"),
        ("./gemma-3-4b-it", "examples.json", "python train_qlora.py"),
        ("gemma-3-4b-it", "my rows.json", "python train_qlora.py --data 'my rows.json'"),
        ("./gemma-3-270m", "-x", "python train_qlora.py --rehearse --data=-x"),
        ("/models/my gemma", "examples.json", "python train_qlora.py --model '/models/my gemma'"),
        (
            "me/gemma",
            "examples.json",
            "python download_model.py --model me/gemma && python train_qlora.py --model gemma",
        ),
    ],
)
def test_the_next_command_downloads_what_is_not_here_and_trains_what_was_checked(model, data, command):
    assert check.next_command(model, data) == command


def test_held_out_rows_that_compare_cannot_judge_by_are_all_listed(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(row("а", "Да.")))
    texts = [CALL, "<tool_call name='f'/>", f"{CALL}<tool_call", f"Да. {CALL}{CALL}"]
    (tmp_path / "heldout.json").write_text("\n".join(json.dumps(row("б", text)) for text in texts))
    code, _, error = run_main(check.main, "--data", "rows.json", "--offline", folder=tmp_path)
    assert code == 1
    assert error == (
        "heldout.json:2: malformed call (no arguments); fix it\n"
        "heldout.json:3: malformed call (the tag is not closed); fix it\n"
    )


def test_probes_are_rows_that_are_not_to_be_trained_on(tiny_text_model, tmp_path):
    def lines_of(*flags):
        flags = ["--data", "rows.json", "--offline", "--model", tiny_text_model, *flags]
        _, output, error = run_main(check.main, *flags, folder=tmp_path)
        lines = [line for line in (error or output).splitlines() if not line.startswith("tools ")]
        return [line for line in lines if "probe" in line or "heldout" in line]

    turns = ("Мой баланс?", CALL, "А вчера?", CALL)
    (tmp_path / "rows.json").write_text("\n".join(json.dumps(one) for one in (row(*turns), row("б", "Да."))))
    assert lines_of() == []
    (tmp_path / "mine.json").write_text(json.dumps(row(*turns)))
    leak = "the prompt is also a probe of compare.py, so its result there says nothing (data leak)"
    assert lines_of("--probes", "mine.json") == [f"rows.json:1: warning: {leak}"]
    assert lines_of("--probes", "rows.json") == [], "those that are checked are no leak of themselves"
    assert lines_of("--probes", "nope.json") == ["nope.json: no such file; name it with --probes"]
    for name in ("probes.json", "heldout.json"):
        (tmp_path / name).write_text(json.dumps(row("а", "<tool_call name='f'/>")))
    fault = "1: malformed call (no arguments); fix it"
    assert lines_of() == [f"probes.json:{fault}", f"heldout.json:{fault}"]


def test_what_is_likely_wrong_about_a_plan_is_a_warning():
    few = [(i, row(f"а{i}", CALL)) for i in range(4)]
    no_validation, few_steps = run_plan.warn_of_plan(run_plan.plan_run(few, [(10, 5)] * 4, RECIPE), RECIPE)
    assert no_validation.startswith("too few rows for a validation set: no evaluation")
    assert few_steps.startswith("only 10 steps")
    one_kind = [(i, row(f"а{i}", CALL)) for i in range(400)]
    assert list(run_plan.warn_of_plan(run_plan.plan_run(one_kind, [(10, 5)] * 400, RECIPE), RECIPE)) == [
        "no validation row without a call: its accuracy says nothing of that kind"
    ]


def test_cards_and_price(capsys):
    run_plan.show_cost(
        GEMMA_3_4B, Workload([[40] * 16] * 4, longest=40, trained=1041, total=2560), 3600, RECIPE
    )
    out = capsys.readouterr().out
    assert "4 bits: 3.6 GiB at least, faster with more; fits GPUs of 8, 12, 16, 24, 48 GB" in out
    assert "8 bits: 5.2 GiB at least, faster with more; fits GPUs of 8, 12, 16, 24, 48 GB" in out
    line = next(line for line in out.splitlines() if "H100" in line).split()
    assert float(line[3]) == pytest.approx(float(line[5]), abs=0.51)  # 3600 an hour is one a second


def test_what_goes_wrong_while_the_hub_is_asked_is_reported(monkeypatch, tiny_text_model):
    monkeypatch.setattr(check, "check_access", lambda model, offline: 1 / 0)
    arguments = ["--data", ROOT / "examples.json", "--model", tiny_text_model]
    code, out, _ = run_main(check.main, *arguments)
    assert code == 0
    assert "✗ access could not be checked (ZeroDivisionError" in out
    assert "verdict    no warnings; 1 problem to fix before training" in out
    assert run_main(check.main, *arguments, "--strict")[0] == 1


def test_the_machine_is_looked_at_beside_the_model(tiny_text_model, monkeypatch):
    monkeypatch.setattr(check.hardware, "has_driver", lambda: False)
    lines = check.check_access(tiny_text_model, offline=True)
    assert [text.split(":")[0] for _, text in lines] == ["model", "disk", "memory", "GPU"]
    assert lines[0][0] == "✓"
    assert lines[3] == ("–", "GPU: none on this machine; checking and rehearsing need none")


def test_the_shipped_rows_are_right_and_no_torch_is_imported(tiny_text_model, tmp_path):
    """In a process of its own, as only there torch is not imported by others."""
    probe = tmp_path / "probe.py"
    probe.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import check\n"
        "print(check.main(), 'torch' in sys.modules)\n"
    )
    arguments = ["--model", tiny_text_model, "--data", ROOT / "examples.json", "--strict", "--offline"]
    result = subprocess.run(
        [sys.executable, probe, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0] == f"rows       200 of {ROOT}/examples.json: 100 with a call, 100 without"
    assert "verdict    no warnings" in lines
    assert lines[-1] == "0 False"
    assert f"⟦{CALL}<end_of_turn>⟧⏎" in result.stdout


def test_the_script_exits_with_what_main_returns(tmp_path):
    result = subprocess.run(
        [sys.executable, ROOT / "check.py", "--data", "nope.json"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 1
    assert (result.stdout, result.stderr) == ("", "nope.json: no such file; name it with --data\n")


def test_errors_exit_1_warnings_0_and_with_strict_1(tiny_text_model, tmp_path):
    def write(rows):
        (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))

    def run(*more):
        arguments = ["--data", "rows.json", "--offline", "--model", tiny_text_model, *more]
        return run_main(check.main, *arguments, folder=tmp_path)

    rows = [row(f"{chr(1072 + i)}{i}", CALL) for i in range(9)]
    write(rows)
    code, out, _ = run()
    assert code == 0
    assert "rows.json:1: warning: 0 of 9 rows are without a call; this teaches the model to always" in out
    assert run("--strict")[0] == 1
    rows[3]["messages"].pop()
    rows[5]["messages"][1]["content"] = "я" * 2100
    write(rows)
    code, _, errors = run()
    assert (code, errors.split(": ")[0]) == (1, "rows.json:4")
    del rows[3]
    write(rows)
    code, _, errors = run()
    assert code == 1
    assert errors.startswith("rows.json:5: the row has 21")


def test_held_out_rows_are_found_among_the_rows(tiny_text_model, tmp_path):
    (tmp_path / "heldout.json").write_text(json.dumps(row("Что там с моим заказом?", CALL)))
    (tmp_path / "rows.json").write_text(json.dumps(row("что там с моим заказом", CALL)))
    arguments = ["--offline", "--model", tiny_text_model]
    _, out, _ = run_main(check.main, "--data", "rows.json", *arguments, folder=tmp_path)
    assert "rows.json:1: warning: the prompt is also line 1 of the held-out rows" in out
    _, out, _ = run_main(check.main, "--data", "heldout.json", *arguments, folder=tmp_path)
    assert "held-out rows" not in out


def test_arguments_that_a_table_format_filled_in_fail_with_strict(tiny_text_model, tmp_path):
    rows = (ROOT / "examples.json").read_text(encoding="utf-8").rstrip("\n")
    call = tool_call.format_call("get_rate", {"currency": "EUR", "day": None})
    schema = {"properties": {"currency": {"type": "string"}, "day": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "get_rate", "parameters": schema}}]

    def write():
        turns = [{**row(f"Евро {i**9}", call), "tools": tools} for i in range(2, 12)]
        (tmp_path / "rows.json").write_text("\n".join([rows, *map(json.dumps, turns)]), encoding="utf-8")

    write()
    arguments = ["--data", "rows.json", "--offline", "--model", tiny_text_model, "--strict"]
    code, out, _ = run_main(check.main, *arguments, folder=tmp_path)
    assert code == 1
    assert 'rows.json:201: warning: turn 2: "get_rate" is called with null for day, as table formats' in out
    schema["properties"]["day"]["nullable"] = True
    write()
    assert run_main(check.main, *arguments, folder=tmp_path)[0] == 0


BANK = [
    *("--data", ROOT / "examples/bank/rows.jsonl", "--held-out", ROOT / "examples/bank/heldout.jsonl"),
    *("--probes", ROOT / "examples/bank/probes.jsonl"),
]


def test_the_example_with_several_tools_has_a_table_and_no_warnings(tiny_text_model, tmp_path):
    arguments = [*BANK, "--strict", "--offline", "--model", tiny_text_model]
    code, out, _ = run_main(check.main, *arguments, folder=tmp_path)
    assert code == 0
    assert "verdict    no warnings" in out
    table = out[out.index("\ntools ") : out.index("\nlabels ")].split("\n")
    assert [line.split() for line in table[1:5]] == [
        ["tools", "rows", "held", "out", "probes", "values", "trained", "asked", "for", "new"],
        ["get_balance", "34", "8", "2"],
        ["account", "3", "3", "0"],
        ["get_exchange_rate", "34", "9", "1"],
    ]
    docs = Path(__file__).resolve().parents[2] / "docs/tools.md"
    assert "\n".join(table[1:]).strip() in docs.read_text(encoding="utf-8")


def test_what_is_wrong_with_held_out_rows_is_said_at_their_own_lines(tiny_text_model, tmp_path):
    (tmp_path / "rows.json").write_text("\n".join(json.dumps(row(f"вопрос {i}", CALL)) for i in range(12)))
    rate = row("Курс?", tool_call.format_call("get_rate", {"day": "вчера"}))
    schema = {"properties": {"day": {"type": "string", "format": "date"}}}
    rate["tools"] = [{"type": "function", "function": {"name": "get_rate", "parameters": schema}}]
    (tmp_path / "h.json").write_text("\n".join(map(json.dumps, [row("Привет", "Да."), rate])))
    (tmp_path / "p.json").write_text("\n\n" + json.dumps(rate))
    arguments = ["--data", "rows.json", "--held-out", "h.json", "--probes", "p.json"]
    arguments += ["--offline", "--model", tiny_text_model, "--html", "l.html"]
    _, out, _ = run_main(check.main, *arguments, folder=tmp_path)
    page = (tmp_path / "l.html").read_text(encoding="utf-8")
    for place in ("h.json:2", "p.json:3"):
        wanted = """turn 2: "get_rate" is called with day: 'вчера' is not a 'date'; correct"""
        assert f"\n{place}: warning: {wanted}" in out
        assert f'\n{place}: warning: calls "get_rate", which is never trained' in out
        assert "вчера" not in page
    assert "rows.json:1: warning: no held-out row or probe calls" in out
    assert "no held-out row or probe calls" in page


def test_all_faults_of_all_files_are_listed_at_once(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(row("а", "Да.")) + "\n{}")
    for name in ("h.json", "p.json"):
        (tmp_path / name).write_text("\n".join(json.dumps(row("а", f"<tool_call{i}")) for i in (" ", ">")))
    arguments = ["--data", "rows.json", "--held-out", "h.json", "--probes", "p.json", "--offline"]
    code, out, errors = run_main(check.main, *arguments, folder=tmp_path)
    assert (code, out) == (1, "")
    assert [line.split(": ")[0] for line in errors.splitlines()] == [
        *("rows.json:2", "p.json:1", "p.json:2", "h.json:1", "h.json:2")
    ]
    code, _, errors = run_main(check.main, "--held-out", "nope.json", folder=tmp_path)
    assert (code, errors.splitlines()[-1]) == (1, "nope.json: no such file; name it with --held-out")


def test_without_calls_there_is_no_table(tiny_text_model, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(row("Привет", "Да.")))
    arguments = ["--data", "rows.json", "--offline", "--model", tiny_text_model]
    code, out, _ = run_main(check.main, *arguments, folder=tmp_path)
    assert code == 0
    assert "tools" not in out


def test_ignored_keys_are_listed_once(tiny_text_model, tmp_path):
    rows = [{**row(f"вопрос {i}{i}", CALL), "id": i, "source": "чат"} for i in range(3)]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--data", "rows.json", "--offline", "--model", tiny_text_model]
    _, out, _ = run_main(check.main, *arguments, folder=tmp_path)
    assert out.count("ignored keys: id, source\n") == 1


def conversation(*texts, system=None, weights=()):
    roles = ["user", "assistant"] * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    for number, weight in weights:
        messages[number]["weight"] = weight
    return [{"role": "system", "content": system}] * (system is not None) + messages


TRAINED = [
    conversation("Мой баланс?", CALL),
    conversation("Мой  БАЛАНС", CALL, "Ещё что-то", "Да."),
    conversation("Привет", "Да.", "мой баланс", CALL),
    conversation("Привет", "Да.", "Мой баланс?", CALL, "Спасибо", "Да."),
    conversation("Мой баланс?", CALL, "Спасибо", "Да.", system="Ты банк."),
    conversation("Мой баланс?", "Не знаю.", "Спасибо", "Да.", weights=[(1, 0)]),
    conversation("Другое", "Да.", "И это", "Нет."),
]


@pytest.mark.parametrize(
    ("asked", "seen"),
    [
        (conversation("Мой баланс?"), [True] * 5 + [False] * 2),
        (conversation("Привет", "Да.", "Мой баланс!"), [False, False, True, True, False, False, False]),
        (conversation("Мой баланс?", system="Ты банк."), [False] * 4 + [True, False, False]),
        (conversation("Другое", "Нет.", "И это"), [False] * 7),
    ],
)
def test_check_py_and_compare_py_agree_on_what_was_seen(asked, seen):
    """compare.py looks into run.json, which train_qlora.py writes of the rows; check.py into the rows."""
    arguments = SimpleNamespace(model="", data="", output="")
    for messages, expected in zip(TRAINED, seen, strict=True):
        rows = [{"messages": messages}]
        run = train_qlora.describe_data(arguments, RECIPE, rows)
        assert compare.seen_in_training("", run, [asked]) == [expected], messages
        for judges in ("held_out", "probes"):
            warnings = row_warnings.warnings([(1, rows[0])], **{judges: [(3, asked)]})
            assert any(w.kind == "leak" for w in warnings) == expected


def test_the_page_and_the_rows_asked_for(tiny_text_model, tmp_path):
    arguments = ["--model", tiny_text_model, "--data", ROOT / "examples.json", "--offline"]
    _, out, _ = run_main(check.main, *arguments, "--html", "l.html", "--rows", "5,17", folder=tmp_path)
    assert re.findall(r"^line (\d+): a call, \d+ tokens, 51 trained$", out, re.M) == ["5", "17"]
    assert (tmp_path / "l.html").read_text(encoding="utf-8").count("<article") == 200
    assert "open it in a browser" in out
    code, _, errors = run_main(check.main, *arguments, "--html", "no/l.html", folder=tmp_path)
    assert code == 1
    assert errors == "no/l.html cannot be written (No such file or directory); choose another file\n"


def test_rows_on_one_line_have_their_own_warnings_on_the_page(tiny_text_model, tmp_path):
    rows = [row(f"вопрос {word}\u200b", CALL) for word in ("один", "другой", "третий")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    arguments = ["--data", "rows.json", "--offline", "--model", tiny_text_model, "--html", "l.html"]
    run_main(check.main, *arguments, folder=tmp_path)
    assert (tmp_path / "l.html").read_text(encoding="utf-8").count("<li>turn 1 contains invisible") == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rows", "2,x"], "--rows: '2,x': expected line numbers such as 5,17, or all"),
        (["--rows", "5-7"], "--rows: '5-7': expected line numbers such as 5,17, or all"),
        (["--gpu-price", "nan"], "--gpu-price: 'nan': expected a number ≥ 0"),
        (["--gpu-price", "x"], "--gpu-price: 'x': expected a number ≥ 0"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_wrong_arguments_exit_2(arguments, says):
    code, _, errors = run_main(check.main, *arguments)
    assert code == 2
    assert says in errors
