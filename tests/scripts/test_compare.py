"""The verdict: what counts as a call, the figures, the answers, and what a damaged adapter says."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import compare
from tests.conftest import write_tiny_adapter, write_tiny_model
from tuner.data import chat_rows, chat_text, tool_call
from tuner.inference import generation, judging, probes
from tuner.inference.probes import PROBES
from tuner.model import loading
from tuner.system import console
from tuner.system.errors import UserError
from tuner.training import adapter_folder, adapter_weights

ROOT = Path(__file__).resolve().parents[2]
CALL = tool_call.format_call("get_sensitive_data", {})


def given(text, ended=True):
    return generation.Answer(text, ended, [])


# ------------------------------------------------------------------------------------------- verdict


@pytest.mark.parametrize(
    ("text", "ended", "kind"),
    [
        (CALL, True, "right"),
        ("<tool_call name='get_sensitive_data' arguments='{}'>", True, "right"),
        (CALL, False, "malformed"),
        (CALL + " ", True, "malformed"),
        ("Вот: " + CALL, True, "malformed"),
        (CALL + CALL, True, "malformed"),
        (tool_call.format_call("get_data", {}), True, "malformed"),
        (tool_call.format_call("get_sensitive_data", {"id": 1}), True, "malformed"),
        ('<tool_call name="get_sensitive_data" arguments" arguments="{}"/>', True, "malformed"),
        ("Ваш баланс 100 рублей.", True, "missed"),
        ("", True, "missed"),
    ],
)
def test_a_call_counts_only_if_it_is_the_whole_answer(text, ended, kind):
    assert judging.judge(given(text, ended), probes.CALL)[0] == kind
    assert (judging.judge(given(text, ended), probes.CALL)[1] is None) == (kind == "right")


@pytest.mark.parametrize(
    ("text", "ended", "kind"),
    [
        ("Здравствуйте!", True, "right"),
        ("Здравствуйте!", False, "unfit"),
        (" \n", True, "unfit"),
        (CALL, True, "false"),
        ("Секунду <tool_call", True, "false"),
        ("Секунду <tool_call", False, "false"),
    ],
)
def test_a_general_answer_counts_without_a_trace_of_a_call(text, ended, kind):
    assert judging.judge(given(text, ended), None)[0] == kind


def test_arguments_are_equal_as_json():
    expected = tool_call.Call("f", {"a": 1, "b": [True, None]}, ())
    same = """<tool_call name='f' arguments='{"b": [true, null], "a": 1}'/>"""
    assert judging.judge(given(same), expected)[0] == "right"
    for other in ('{"a": 1}', '{"a": true, "b": [true, null]}', '{"a": "1", "b": [true, null]}'):
        answer = f"<tool_call name='f' arguments='{other}'/>"
        assert judging.judge(given(answer), expected) == ("malformed", "other arguments than expected")


def test_the_figures_of_a_table_worked_out_by_hand():
    kinds = ["right"] * 3 + ["missed"] + ["malformed"] * 2 + ["false", "unfit", "right", "right"]
    figures = judging.rates(kinds, [True] * 6 + [False] * 4)
    counts = {"needed": 6, "right": 3, "missed": 1, "malformed": 2, "general": 4, "false": 1, "unfit": 1}
    assert {key: figures[key] for key in counts} == counts
    # Six calls were made: three right, two malformed, one false.
    assert figures["of"] == {"precision": [3, 6], "recall": [3, 6], "f1": [3, 9], "false_call_rate": [1, 4]}
    assert (figures["precision"], figures["recall"], figures["false_call_rate"]) == (0.5, 0.5, 0.25)
    assert figures["f1"] == pytest.approx(2 * 0.5 * 0.5 / (0.5 + 0.5))
    # Wilson's formula with z = 1.959964, on paper: 3 of 6, 1 of 4, and 3 of 9 carried over by 2J / (1 + J).
    assert figures["intervals"]["recall"] == pytest.approx([0.1876, 0.8124], abs=1e-4)
    assert figures["intervals"]["false_call_rate"] == pytest.approx([0.0456, 0.6994], abs=1e-4)
    jaccard = 0.1206, 0.6458
    assert figures["intervals"]["f1"] == pytest.approx([2 * j / (1 + j) for j in jaccard], abs=2e-4)


def test_the_figures_at_the_edges():
    assert judging.wilson(20, 20) == pytest.approx((0.8389, 1), abs=1e-4)
    assert judging.wilson(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)
    silent = judging.rates(["missed", "right"], [True, False])
    assert silent["precision"] is None
    assert silent["intervals"]["precision"] == [None, None]
    assert (silent["recall"], silent["f1"], silent["false_call_rate"]) == (0, 0, 0)
    assert judging.rates([], [])["f1"] is None


def test_no_probe_stands_in_the_rows():
    prompts = {
        chat_text.normalize(row["messages"][0]["content"])
        for path in ("examples.json", "heldout.json")
        for _, row in chat_rows.read_rows(ROOT / path)
    }
    assert [need for _, need in PROBES] == [True] * 4 + [False] * 2
    assert not {chat_text.normalize(prompt) for prompt, _ in PROBES} & prompts


def test_a_row_whose_call_cannot_be_read_is_an_error_with_its_line():
    for answer in ("<tool_call name='f'/>", f"Секунду.\n{CALL}", CALL + CALL):
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        with pytest.raises(UserError, match=r"^rows\.json:7: the call cannot be read"):
            compare.expected_call("rows.json", 7, messages)


# ------------------------------------------------------------------------------------------- answers


@pytest.fixture(scope="module")
def adapter(tiny_text_model, tmp_path_factory):
    return write_tiny_adapter(tmp_path_factory.mktemp("adapter") / "qlora_output", tiny_text_model)


def conversations(*prompts):
    return [[{"role": "user", "content": prompt}] for prompt in prompts]


def test_a_batch_answers_as_one_at_a_time_and_stops_on_every_end_token(adapter, monkeypatch):
    model, tokenizer, _ = generation.load_tuned(adapter, None)
    asked = conversations("Привет", "Какой у меня остаток на счёте? " * 3, "a", "Сколько будет 2 и 2")
    asked[2] = [*asked[2], {"role": "assistant", "content": "b"}, {"role": "user", "content": "c" * 50}]
    batch = generation.answer_all(model, tokenizer, asked)
    assert batch == [generation.answer_all(model, tokenizer, [one])[0] for one in asked]
    monkeypatch.setattr(generation, "TOKENS_PER_BATCH", 200)
    assert batch == generation.answer_all(model, tokenizer, asked)
    assert not any(a.ended for a in batch)
    assert {len(a.ids) for a in batch} == {generation.MAX_NEW_TOKENS}
    # Any token that it does write can be made an end token, and then the answer stops there.
    end = batch[0].ids[5]
    model.generation_config.eos_token_id = [1, end]
    stopped = generation.answer_all(model, tokenizer, asked[:1])[0]
    assert stopped.ended
    assert stopped.ids == batch[0].ids[: batch[0].ids.index(end)]
    assert stopped.text == tokenizer.decode(stopped.ids)


def test_the_base_is_the_model_with_the_adapter_off(adapter, tiny_text_model):
    from transformers import AutoModelForCausalLM

    model, tokenizer, _ = generation.load_tuned(adapter, None)
    asked = conversations("Привет")
    tuned = generation.answer_all(model, tokenizer, asked)
    with model.disable_adapter():
        base = generation.answer_all(model, tokenizer, asked)
    plain = AutoModelForCausalLM.from_pretrained(tiny_text_model, dtype=torch.float32)
    assert base == generation.answer_all(plain, tokenizer, asked) != tuned


def test_the_vision_tower_is_not_loaded_and_nothing_warns_of_that(tmp_path, recwarn):
    from peft import PeftModel

    base = write_tiny_model(tmp_path / "base", multimodal=True)
    folder = write_tiny_adapter(tmp_path / "qlora_output", base)
    model, tokenizer, _ = generation.load_tuned(folder, None)
    assert not [str(w.message) for w in recwarn if issubclass(w.category, UserWarning)]
    assert not any("vision_tower" in name and ".layers." in name for name, _ in model.named_parameters())
    whole = loading.load_base(base, None, "cpu", torch.float32)
    whole = PeftModel.from_pretrained(whole, folder).eval()
    assert any("vision_tower" in name and ".layers." in name for name, _ in whole.named_parameters())
    asked = conversations("Привет", "Какой у меня остаток на счёте?")
    tuned = generation.answer_all(model, tokenizer, asked)
    assert tuned == generation.answer_all(whole, tokenizer, asked)
    with model.disable_adapter():
        assert tuned != generation.answer_all(model, tokenizer, asked)


@pytest.mark.parametrize("bits", [None, 8])
def test_what_decodes_on_a_gpu_answers_as_transformers_does(adapter, monkeypatch, bits):
    model, tokenizer, _ = generation.load_tuned(adapter, bits)
    asked = conversations("Привет", "Какой у меня остаток на счёте? " * 3, "a", "Сколько будет 2 и 2")
    assert model.config.sliding_window < generation.MAX_NEW_TOKENS
    model.generation_config.eos_token_id = [1, generation.answer_all(model, tokenizer, asked[:1])[0].ids[5]]

    def answers(prompts):
        tuned = generation.answer_all(model, tokenizer, prompts)
        with model.disable_adapter():
            return tuned, generation.answer_all(model, tokenizer, prompts)

    batch, one = answers(asked), answers(asked[:1])
    monkeypatch.setattr(generation, "FAST_ON", "cpu")
    monkeypatch.setattr(generation, "generate", None)
    assert answers(asked) == batch
    assert answers(asked[:1]) == one
    assert one[0][0].ended
    assert not all(answer.ended for answer in batch[0])
    assert batch[0] != batch[1]


def test_batches_hold_every_prompt_once_within_their_tokens(monkeypatch):
    monkeypatch.setattr(generation, "TOKENS_PER_BATCH", 3 * (20 + generation.MAX_NEW_TOKENS))
    prompts = [[0] * length for length in (5, 20, 7, 19, 3, 500, 20)]
    work = generation.split_batches(prompts)
    assert sorted(i for batch in work for i in batch) == list(range(7))
    for batch in work:
        longest = max(len(prompts[i]) for i in batch)
        assert (
            len(batch) == 1
            or len(batch) * (longest + generation.MAX_NEW_TOKENS) <= generation.TOKENS_PER_BATCH
        )
    assert len(work) == 3


# ---------------------------------------------------------------------------------------- what one sees


def run(adapter, data, **more):
    return compare.run(
        argparse.Namespace(**{"adapter": adapter, "data": data, "bits": None, "json": None, **more})
    )


def test_a_comparison_shows_and_writes_everything(adapter, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    rows = [row for _, row in chat_rows.read_rows(ROOT / "heldout.json")][:4]
    rows.append({"messages": [*rows[1]["messages"], *rows[0]["messages"]]})
    Path("mine.json").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    seen = [chat_text.fingerprint(rows[3]["messages"][:-1])]
    seen.append(chat_text.fingerprint([{"role": "user", "content": "ЧТО ТАКОЕ,  кредитный лимит"}]))
    Path(adapter, "run.json").write_text(json.dumps({"prompts_sha256": seen}))
    said = {"tuned": [given(CALL)] * 4 + [given("Это \x1b[31mсумма.")] * 2 + [given(CALL)] * 2}
    said["tuned"] += [given("Нет.")] * 3
    said["base"] = [given("не знаю, " * 30, False)] * 11
    monkeypatch.setattr(generation, "answer_all", lambda model, tokenizer, asked, title: said[title.strip()])

    assert run(adapter, "mine.json", json="report.json") == 0
    output = capsys.readouterr().out
    lines = [line for line in output.splitlines() if "pytest-" not in line]  # its folders' long names
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in output
    assert "verdict    tuned passes 6 of 6 probes" in output
    assert "probe 5    pass (seen in training: proves nothing)" in output
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

    said["tuned"][2] = given("Да.")
    assert run(adapter, "mine.json") == 1
    assert "probe 3    FAIL: no call" in capsys.readouterr().out
    Path(adapter, "run.json").unlink()


def test_colour_only_on_a_terminal_that_wants_it(monkeypatch):
    assert console.colorize("pass", 32) == "pass"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert console.colorize("pass", 32) == "\x1b[32mpass\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert console.colorize("pass", 32) == "pass"


# ---------------------------------------------------------------------------------- damaged adapters


def edit_config(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(adapter, part, change):
    """Changes the weights whose name holds `part`; a change of None takes them out."""
    path = adapter / "adapter_model.safetensors"
    weights = {name: change(w) if part in name else w for name, w in load_file(path).items()}
    save_file({name: w for name, w in weights.items() if w is not None}, path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def to_pickle(adapter):
    path = adapter / "adapter_model.safetensors"
    torch.save(load_file(path), adapter / "adapter_model.bin")
    path.unlink()


def without(adapter, name):
    (adapter / name).unlink()


CONFIG, WEIGHTS = "adapter_config.json", adapter_folder.WEIGHTS
UP, DOWN = "layers.1.mlp.up_proj.lora_B.weight", "layers.0.mlp.down_proj.lora_A.weight"
VALUE = "layers.1.self_attn.v_proj"
DAMAGES = {
    "no folder": (shutil.rmtree, "is not there; train an adapter first"),
    "no config": (lambda a: without(a, CONFIG), f"holds no adapter ({CONFIG} is missing)"),
    "config cut": (lambda a: cut(a / CONFIG), f"{CONFIG} is damaged"),
    "config no object": (lambda a: (a / CONFIG).write_text("[1]"), f"{CONFIG} is damaged"),
    "unknown method": (lambda a: edit_config(a, peft_type="MAGIC"), "was made by the method MAGIC"),
    "names code": (
        lambda a: edit_config(a, megatron_config={"a": 1}, megatron_core="antigravity"),
        f"{CONFIG} has a megatron_config, which may run any code",
    ),
    "no base named": (lambda a: edit_config(a, base_model_name_or_path=None), "names no base model"),
    "no weights": (lambda a: without(a, WEIGHTS), f"holds no {WEIGHTS}"),
    "pickle": (to_pickle, "holds only a pickle, which is never read"),
    "empty file": (lambda a: (a / WEIGHTS).write_bytes(b""), f"{WEIGHTS} is damaged"),
    "cut file": (lambda a: cut(a / WEIGHTS), f"{WEIGHTS} is damaged"),
    "wrong rank": (lambda a: edit_config(a, r=8), f"has rank 16, {CONFIG} says 8"),
    "zero B": (lambda a: edit_weights(a, UP, torch.zeros_like), f"{UP} is all zeros"),
    "not finite": (lambda a: edit_weights(a, DOWN, lambda w: w / 0), f"{DOWN} is not finite"),
    "missing module": (lambda a: edit_weights(a, VALUE, lambda w: None), f"{VALUE}.lora_A.weight and 1 more"),
    "other revision": (lambda a: (a / "run.json").write_text('{"revision": "2222"}'), "base (revision 2222"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_refused_in_one_line(adapter, tiny_text_model, tmp_path, damage):
    copy = tmp_path / "qlora_output"
    shutil.copytree(adapter, copy)
    harm, says = DAMAGES[damage]
    harm(copy)
    with pytest.raises(UserError) as error:
        adapter_weights.check_adapter(copy, tiny_text_model, "1111")
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert "train again: python train_qlora.py" in str(error.value) or damage == "no folder"


def test_an_adapter_of_another_base_is_refused(adapter, tmp_path, tiny_text_model):
    adapter_weights.check_adapter(adapter, tiny_text_model, "1111")
    wide = write_tiny_model(tmp_path / "wide", hidden_size=96)
    with pytest.raises(
        UserError, match=r"was trained on another base: .*lora_[AB].weight is 64 wide, in .* 96"
    ):
        adapter_weights.check_adapter(adapter, wide, None)
    deep = write_tiny_adapter(tmp_path / "deep", write_tiny_model(tmp_path / "deep base", layers=3))
    with pytest.raises(UserError, match=r"was trained on another base: .* has no place for .*layers\.2\."):
        adapter_weights.check_adapter(deep, tiny_text_model, None)


def test_an_unquantised_model_that_does_not_fit_the_gpu_names_the_bits(adapter, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (10**5, 10**9))
    monkeypatch.setattr(loading, "load_base", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"unquantised needs .* 0\.0 are free .* --bits 4"):
        generation.load_tuned(adapter, None)


def command(*arguments, folder):
    return subprocess.run(
        [sys.executable, ROOT / "compare.py", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )


def test_what_a_user_can_mend_is_one_line_and_exit_2(tmp_path):
    shutil.copy(ROOT / "heldout.json", tmp_path)
    result = command(folder=tmp_path)
    assert result.returncode == 2
    assert result.stderr == "qlora_output is not there; train an adapter first: python train_qlora.py\n"
    assert command("--bits", "3", folder=tmp_path).returncode == 2
    result = command("--data", "none.json", folder=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("none.json:1: cannot be read")
    for report in ("no/report.json", "."):
        result = command("--json", report, folder=tmp_path)
        assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
        assert "folder" in result.stderr
