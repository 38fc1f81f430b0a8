"""check.py: what is legal and yet wrong in rows, the labels shown, plan, memory, and what a user sees."""

import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Gemma3ForCausalLM

import check
import train_qlora
from benchmarks import random_gemma_4b
from tests.support.tiny_models import tiny_config
from tuner.data import chat_rows, row_warnings
from tuner.inference.probes import PROBES
from tuner.model import hub
from tuner.system import devices
from tuner.system.errors import UserError
from tuner.training import memory_plan

ROOT = Path(__file__).resolve().parents[2]
CALL = '<tool_call name="get_sensitive_data" arguments="{}"/>'


def row(*texts):
    roles = ["user", "assistant"] * (len(texts) // 2)
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]}


def balanced(*rows):
    """The rows, numbered as lines, with as many of both kinds around them that nothing else is found."""
    fill = [row(f"{word} {i}{i * 7}?", CALL if i % 2 else "Да.") for i, word in enumerate("абвгд" * 6)]
    return list(enumerate([*rows, *fill], 1))


def told(*rows, **kwargs):
    found = row_warnings.warnings(balanced(*rows), **kwargs)
    return [f"{line} {kind}: {text}" for line, kind, text in found]


# ---------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([row("Мой баланс?", CALL)], []),
        (
            [row("Мой баланс?", CALL), row("мой  Баланс", "Не знаю.")],
            ["2 contradiction: the same prompt as line 1 with another answer"],
        ),
        (
            [row("Мой баланс?", CALL), row("мой  Баланс", CALL)],
            ["2 duplicate: the same row as line 1"],
        ),
        (
            [row("Сколько денег осталось на моей карте сегодня", CALL),
             row("Сколько денег осталось на моей карте сегодни", CALL)],
            ["2 near-duplicate: nearly the prompt of line 1 (95% alike)"],
        ),
        (
            [row("Покaжи счёт", CALL)],
            ['1 look-alikes: turn 1: in "Покaжи" a is Latin'],
        ),
        ([row("Мой iPhone и SMS-код, Wi-Fi, IT-отдел", CALL)], []),
        (
            [row("Мой\u00a0счёт\u200b", CALL)],
            ["1 invisible: turn 1 holds an invisible character: NO-BREAK SPACE, ZERO WIDTH SPACE"],
        ),
        ([row("Семья 👨\u200d👩\u200d👧 и флаг ❤️\nда", "Да.")], []),
        ([row("Мой счёт ", CALL)], ["1 blanks: turn 1 begins or ends with blanks, which are not learned"]),
        (
            [row("Мой счёт", f"Вот: {CALL}")],
            ["1 call: turn 2: the call cannot be read as one (text around the call)"],
        ),
        (
            [row("Мой счёт", CALL.replace("{}", "{"))],
            ["1 call: turn 2: the call cannot be read as one (the tag is not closed)"],
        ),
        (
            [row("Мой счёт", CALL.replace("{}", "[]"))],
            ["1 call: turn 2: the call cannot be read as one (the arguments are not a JSON object)"],
        ),
        ([row("Мой счёт", CALL.replace('"', "'"))], ["1 call: turn 2: the call has single quotes"]),
        ([row("Первый вопрос", f"{CALL} вот", "А второй", "Да.")],
         ["1 call: turn 2: the call cannot be read as one (text around the call)"]),
        (
            [row("Мой счёт", CALL.replace("sensitive", "sensitve"))],
            ["1 spelling: the call's name is \"get_sensitve_data\", and "
             '"get_sensitive_data" in 15 other places'],
        ),
        ([row("Мой счёт", CALL.replace("sensitive_data", "weather"))], []),
        (
            [row("Добрый день, как настроение", "Хорошо.")],
            ["1 judge: the prompt is a probe of compare.py too, which then proves nothing"],
        ),
        (
            [row("Что там с моим заказом", CALL)],
            ["1 judge: the prompt is line 7 of the held-out rows too, which then proves nothing"],
        ),
    ],
)  # fmt: skip
def test_what_is_legal_and_wrong_is_told_with_its_line(rows, says):
    held_out = [(7, row("Что там с моим заказом?", CALL))]
    assert told(*rows, probes=[p for p, _ in PROBES], held_out=held_out) == says


def test_rows_with_tool_calls_are_looked_at_as_the_text_that_they_become(tmp_path, tokenizer):
    call = {"id": "a", "type": "function", "function": {"name": "get_sensitive_data", "arguments": "{}"}}
    asked = [{"role": "user", "content": "Мой баланс?"}, {"role": "assistant", "tool_calls": [call]}]
    results = [{"role": "tool", "tool_call_id": name, "content": f"5\u200b{name}"} for name in "ab"]
    twice = {"role": "assistant", "tool_calls": [call, {**call, "id": "b"}]}
    answer = {"role": "assistant", "content": "Пять. "}
    path = tmp_path / "rows.json"
    rows = [asked, [*asked, results[0], answer], [asked[0], twice, *results, answer]]
    path.write_text("\n".join(json.dumps({"messages": messages}) for messages in rows), encoding="utf-8")
    read = [r for _, r in chat_rows.read_rows(path)]
    assert told(row("Мой баланс?", CALL), *read) == [
        "2 duplicate: the same row as line 1",
        "3 invisible: turn 3 holds an invisible character: ZERO WIDTH SPACE",
        "3 blanks: turn 4 begins or ends with blanks, which are not learned",
        "4 near-duplicate: nearly the prompt of line 3 (89% alike)",
        "4 invisible: turn 3 holds an invisible character: ZERO WIDTH SPACE",
        "4 blanks: turn 4 begins or ends with blanks, which are not learned",
        "4 call: turn 2: the call cannot be read as one (several calls)",
    ]
    trained = "".join(text for text, trained, _ in check.pieces(read[1], tokenizer) if trained)
    assert trained == f"{CALL}<end_of_turn>Пять.<end_of_turn>"


def test_an_argument_spelt_unlike_fifty_others_is_told():
    calls = [row(f"вопрос {i}{i}{i}", "<tool_call name='f' arguments='{\"city\": 1}'/>") for i in range(50)]
    calls.append(row("а это опечатка", '<tool_call name="f" arguments=\'{"citi": 1}\'/>'))
    found = [w for w in told(*calls) if "spelling" in w]
    assert found == ['51 spelling: the argument is "citi", and "city" in 50 other places']


@pytest.mark.parametrize(
    ("calls", "general", "few"),
    [(20, 9, "9 of 29 rows are without"), (9, 20, "9 of 29 rows are with a"), (10, 20, None)],
)
def test_rows_of_one_kind_are_told(calls, general, few):
    rows = [row(f"{chr(1072 + i)}{i}", CALL) for i in range(calls)]
    rows += [row(f"{chr(1072 + i)}{i} привет", "Да.") for i in range(general)]
    found = [text for _, kind, text in row_warnings.warnings(list(enumerate(rows, 1))) if kind == "balance"]
    assert [text[: len(few or "")] for text in found] == ([few] if few else [])


def test_a_row_with_a_call_before_its_last_answer_is_one_with_a_call():
    rows = [row("Привет", "Да.") for _ in range(5)] + [row("Баланс", CALL, "5", "Пять.") for _ in range(5)]
    assert not [kind for _, kind, _ in row_warnings.warnings(list(enumerate(rows, 1))) if kind == "balance"]


def test_near_duplicates_are_those_of_all_pairs():
    chance = random.Random(0)
    words = "мой счёт карта баланс вклад кредит лимит заказ долг покажи сколько какой"
    texts = list({" ".join(chance.choices(words.split(), k=6)) for _ in range(150)})
    texts += [text + " да" for text in texts[:40]]
    chunks = [row_warnings.chunks_of(text) for text in texts]
    alike = {}
    for j in range(len(texts)):
        for i in range(j):
            index = len(chunks[i] & chunks[j]) / len(chunks[i] | chunks[j])
            if index >= row_warnings.ALIKE:
                alike.setdefault(j, {})[i] = index
    found = {j: (i, index) for i, j, index in row_warnings.near_duplicates(texts)}
    assert set(found) <= set(alike)
    assert len(found) >= 0.95 * len(alike) >= 30
    assert all(alike[j][i] == index for j, (i, index) in found.items())


# -------------------------------------------------------------------------------------------- labels


def test_pieces_are_the_labels_of_training(tokenizer):
    shown = check.pieces(row("Да", "Нет <b>"), tokenizer)
    batch = train_qlora.preprocess_function({"messages": [row("Да", "Нет <b>")["messages"]]}, tokenizer)
    assert [trained for _, trained, _ in shown] == [label != -100 for label in batch["labels"][0]]
    assert "".join(text for text, _, _ in shown) == tokenizer.decode(batch["input_ids"][0])
    assert [text for text, _, special in shown if special] == [
        *["<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_turn>", "<end_of_turn>"]
    ]


def test_without_any_tokenizer_one_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code = "from tuner.model import small_model; small_model.SMALL_PACKAGE = 'none'; "
    code += "small_model.build_tokenizer('x')"
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda args, **k: run([*args[:2], code], **k))
    with pytest.raises(UserError) as caught:
        check.find_tokenizer("google/gemma-3-4b-it", online=False)
    assert str(caught.value).startswith("no tokenizer of google/gemma-3-4b-it is here, and the packages")
    assert str(caught.value).endswith("type: pip install -r requirements-rehearsal.txt")
    assert list(tmp_path.iterdir()) == []


def test_the_rows_shown_are_a_call_a_general_and_the_longest_or_those_asked_for():
    rows = [(2, row("а", CALL)), (3, row("б", CALL)), (5, row("в", "Да.")), (9, row("г" * 50, "Да."))]
    counts = [(10, 5), (10, 5), (8, 2), (60, 2)]
    assert [line for line, _ in check.choose(rows, counts, None)] == [2, 5, 9]
    assert [line for line, _ in check.choose(rows, counts, [3, 9])] == [3, 9]
    assert check.choose(rows, counts, "all") == rows
    with pytest.raises(UserError, match="no row begins on line 4"):
        check.choose(rows, counts, [3, 4])


# ------------------------------------------------------------------------------------- plan and cost


def test_the_plan_is_what_training_does(tokenizer):
    rows = chat_rows.read_rows(ROOT / "examples.json")
    counts = check.count_tokens(rows, tokenizer)
    numbers, off = check.plan(rows, counts)
    assert off == []
    assert (numbers["training"], numbers["validation"], numbers["steps"], numbers["warmup"]) == (
        63,
        7,
        40,
        10,
    )
    examples = train_qlora.tokenise_rows(ROOT / "examples.json", [r for _, r in rows], tokenizer)
    assert counts == [(len(e["labels"]), sum(x != -100 for x in e["labels"])) for e in examples]
    training, _ = train_qlora.split_rows([r for _, r in rows])
    assert numbers["epoch"] == [
        [len(examples[i]["input_ids"]) for i in step] for step in train_qlora.steps_of(1, training)
    ]
    assert numbers["longest"] == max(len(ids) for ids in examples["input_ids"])


def test_what_is_off_about_a_plan_is_told():
    few = [(i, row(f"а{i}", CALL)) for i in range(4)]
    assert "nothing is evaluated" in check.plan(few, [(10, 5)] * 4)[1][0]
    one_kind = [(i, row(f"а{i}", CALL)) for i in range(400)]
    assert check.plan(one_kind, [(10, 5)] * 400)[1] == [
        "no row without a call is held out: the best adapter is chosen by the other kind alone"
    ]


def test_dimensions_and_weights_are_the_models_own(tmp_path):
    config = random_gemma_4b.config()
    config.save_pretrained(tmp_path)
    d = memory_plan.read_dimensions(json.loads((tmp_path / "config.json").read_text()))
    assert d == memory_plan.GEMMA_3_4B
    assert memory_plan.lora_weights(d, train_qlora.LORA_R) == 29_802_496
    weights = memory_plan.text_weights(d) + memory_plan.plain_weights(d)
    with torch.device("meta"):
        model = Gemma3ForCausalLM(config.text_config)
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert weights == sum(p.numel() for p in model.parameters()) - norms
    tiny_config(multimodal=False).save_pretrained(tmp_path)
    d = memory_plan.read_dimensions(json.loads((tmp_path / "config.json").read_text()))
    assert (d.layers, d.queries, d.keys) == (2, 64, 32)


# Random weights of the 4B dimensions, H100, torch 2.11, bitsandbytes 0.50.2. Allocated GiB of single
# micro-batches of so many tokens, layers checkpointed; the vision tower, which was loaded then, taken off.
CHECKPOINTED = [(4, 1024, 3.525), (4, 2046, 3.742), (8, 1024, 4.989), (8, 2046, 5.232)]
# Reserved GiB with graphs of so many tokens, of which so many are trained.
GRAPHS = [(4, 600, 128, 6.547), (4, 264, 128, 4.932), (4, 128, 64, 4.092), (4, 64, 36, 3.684)]
GRAPHS += [(8, 600, 128, 8.162), (8, 264, 128, 6.439), (8, 128, 64, 5.586), (8, 64, 36, 5.203)]


@pytest.mark.parametrize(("bits", "tokens", "measured"), CHECKPOINTED)
def test_the_memory_estimate_is_near_what_was_measured(bits, tokens, measured):
    estimate = memory_plan.peak_bytes(memory_plan.GEMMA_3_4B, bits, 16, tokens, 128) / 2**30
    assert math.isclose(estimate, measured, rel_tol=0.05)


@pytest.mark.parametrize(("bits", "tokens", "trained", "measured"), GRAPHS)
def test_a_plan_takes_what_it_may_and_no_more(bits, tokens, trained, measured):
    def planned(gib):
        return memory_plan.make_plans(memory_plan.GEMMA_3_4B, bits, 16, gib * 2**30, trained, 9)[0].tokens

    assert planned(measured) <= tokens
    assert planned(1.15 * measured) > tokens


def test_a_row_that_no_graph_takes_has_its_memory_beside_the_graphs():
    d = memory_plan.GEMMA_3_4B
    for bits, gib in itertools.product((4, 8), range(3, 40)):
        least = memory_plan.least_bytes(d, bits, 16, 2000, 128)
        for budget in (gib * 2**30, gib * 2**30 + 2**29):
            plans = memory_plan.make_plans(d, bits, 16, budget, 128, 2000)
            assert (max(plans[0][:2]) >= 2000) == (budget >= least)
            for plan in plans[1:]:
                assert 0 == plans[0].tokens < plan.tokens < plan.checkpointed == 2000 <= plans[0].checkpointed
                kept = memory_plan.ACTIVATION_WIDTHS[bits] * 2 * (d.hidden + d.intermediate) * d.layers
                logits = memory_plan.BYTES_A_KEPT_LOGIT * d.vocabulary * min(128, plan.tokens)
                assert least + plan.tokens * kept + logits <= budget


def test_cards_and_price(capsys):
    numbers = {"epoch": [[40] * 16] * 4, "longest": 40, "trained_at_once": 128}
    check.show_cost(memory_plan.GEMMA_3_4B, numbers, 3600)
    out = capsys.readouterr().out
    assert "4 bits: 3.6 GiB at least, and faster with more; fits cards of 8, 12, 16, 24, 48 GB" in out
    assert "8 bits: 5.2 GiB at least, and faster with more; fits cards of 8, 12, 16, 24, 48 GB" in out
    line = next(line for line in out.splitlines() if "H100" in line).split()
    assert float(line[3]) == pytest.approx(float(line[5]), abs=0.51)  # 3600 an hour is one a second


def test_the_time_is_near_what_was_measured_and_grows_with_the_rows_and_on_smaller_cards():
    numbers = {"epoch": [[38] * 16] * 4, "longest": 49, "trained_at_once": 128}

    def seconds(bits, card, **other):
        return check.seconds(memory_plan.GEMMA_3_4B, numbers | other, bits, card)

    assert seconds(4, "H100") == pytest.approx(28.7, rel=0.1)  # whole commands, 40 steps
    assert seconds(8, "H100") == pytest.approx((33.4 + 44.0) / 2, rel=0.1)  # on two hosts
    thousands = {"epoch": [list(range(20, 660, 40))] * 282, "longest": 2000}
    epoch = (seconds(4, "H100", **thousands) - seconds(4, "H100", epoch=[], longest=2000)) / 10
    assert epoch == pytest.approx(134, rel=0.15)  # 282 steps of rows of 320 tokens in the mean, measured
    more = seconds(4, "H100", epoch=[[38] * 16] * 40)
    assert 10 < more - seconds(4, "H100") < 60
    assert seconds(4, "T4") > seconds(4, "RTX 3090") > seconds(4, "L4") > seconds(4, "H100")
    long = {"epoch": [[2000] * 16] * 4, "longest": 2000}
    assert seconds(4, "RTX 4090", **long) > seconds(4, "H100", **long) > 1.5 * seconds(4, "H100")


# -------------------------------------------------------------------------------------------- access


@pytest.mark.parametrize(
    ("error", "marks"),
    [
        (None, ["✓ token", "✓ licence"]),
        (("no token (401)", "token"), ["✗ token", "– licence"]),
        (("licence not accepted (403)", "licence"), ["✓ token", "✗ licence"]),
        (("hub unreachable", "hub"), ["✓ token", "✗ hub", "– licence"]),
    ],
)
def test_access_says_what_stands_in_the_way(monkeypatch, error, marks):
    def ask(repo):
        if error:
            raise UserError(*error)
        return "commit", []

    monkeypatch.setattr(hub, "ask_hub", ask)
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    lines = check.access("google/gemma-3-4b-it", offline=False)
    assert [f"{mark} {text.split(':')[0]}" for mark, text in lines][: len(marks)] == marks
    assert "hf_planted" not in str(lines)


def test_offline_asks_no_hub(monkeypatch):
    monkeypatch.setattr(hub, "ask_hub", lambda repo: pytest.fail("the hub was asked"))
    assert check.access("google/gemma-3-4b-it", offline=True)[0][0] == "–"


def test_what_goes_wrong_while_the_hub_is_asked_is_told(monkeypatch, tiny_text_model, capsys):
    monkeypatch.setattr(check, "access", lambda model, offline: 1 / 0)
    arguments = ["--data", str(ROOT / "examples.json"), "--model", tiny_text_model]
    assert check.run(check.parse_arguments(arguments)) == 0
    assert "✗ access could not be checked (ZeroDivisionError" in capsys.readouterr().out
    assert check.run(check.parse_arguments([*arguments, "--strict"])) == 1


def test_a_model_folder_is_looked_into(tiny_text_model, tmp_path):
    assert check.access(tiny_text_model, offline=False)[0] == ("✓", f"model: {tiny_text_model}")
    assert check.access(str(tmp_path), offline=False)[0][0] == "✗"


@pytest.mark.parametrize("bits", [4, 8])
def test_a_wrong_product_of_bitsandbytes_is_refused(monkeypatch, bits):
    import bitsandbytes

    devices.check_quantized_matmul(bits, "cpu", torch.float32)
    if bits == 4:
        right = bitsandbytes.matmul_4bit
        monkeypatch.setattr(bitsandbytes, "matmul_4bit", lambda *a, **k: right(*a, **k) * 1.1)
    else:
        right = bitsandbytes.nn.Linear8bitLt.forward
        monkeypatch.setattr(bitsandbytes.nn.Linear8bitLt, "forward", lambda self, x: right(self, x) * 1.2)
    with pytest.raises(UserError, match=f"multiplies wrongly in {bits} bits"):
        devices.check_quantized_matmul(bits, "cpu", torch.float32)


# ------------------------------------------------------------------------------------------- command


def command(*arguments, folder, **environment):
    result = subprocess.run(
        [sys.executable, ROOT / "check.py", *map(str, arguments)],
        cwd=folder, capture_output=True, text=True, timeout=120, env={**os.environ, **environment},
    )  # fmt: skip
    assert "Traceback" not in result.stderr, result.stderr
    return result


def test_the_shipped_rows_are_right_and_no_torch_is_imported(tiny_text_model, tmp_path):
    probe = tmp_path / "probe.py"
    probe.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import check\n"
        "try: check.main()\nfinally: print('torch' in sys.modules)\n"
    )
    arguments = ["--model", tiny_text_model, "--data", ROOT / "examples.json", "--strict", "--offline"]
    result = subprocess.run(
        [sys.executable, probe, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0] == f"rows       70 of {ROOT}/examples.json: 35 with a call, 35 without"
    assert "verdict    no warnings" in lines
    assert lines[-1] == "False"
    assert f"⟦{CALL}<end_of_turn>⟧⏎" in result.stdout


def test_errors_exit_1_warnings_0_and_with_strict_1(tiny_text_model, tmp_path):
    rows = [row(f"{chr(1072 + i)}{i}", CALL) for i in range(9)]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--data", "rows.json", "--offline", "--model", tiny_text_model]
    result = command(*arguments, folder=tmp_path)
    assert result.returncode == 0
    assert "rows.json:1: warning: 0 of 9 rows are without a call" in result.stdout
    assert command(*arguments, "--strict", folder=tmp_path).returncode == 1
    rows[3]["messages"].pop()
    rows[5]["messages"][1]["content"] = "я" * 2100
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    result = command(*arguments, folder=tmp_path)
    assert (result.returncode, result.stderr.split(": ")[0]) == (1, "rows.json:4")
    del rows[3]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    result = command(*arguments, folder=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("rows.json:5: the row has 21")


def test_the_page_and_the_rows_asked_for(tiny_text_model, tmp_path):
    arguments = ["--model", tiny_text_model, "--data", ROOT / "examples.json", "--offline"]
    result = command(*arguments, "--html", "l.html", "--rows", "5,17", folder=tmp_path)
    assert re.findall(r"^line (\d+): a call, \d+ tokens, 51 trained$", result.stdout, re.M) == ["5", "17"]
    assert (tmp_path / "l.html").read_text(encoding="utf-8").count("<article") == 70
    assert "open it in a browser" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rows", "2,x"], "--rows: invalid lines value: '2,x'"),
        (["--gpu-price", "nan"], "--gpu-price: invalid price value: 'nan'"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_wrong_arguments_exit_2(tmp_path, arguments, says):
    result = command(*arguments, folder=tmp_path)
    assert result.returncode == 2
    assert says in result.stderr
