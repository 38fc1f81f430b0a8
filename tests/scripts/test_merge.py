"""The merged model: its weights against numbers worked out by hand, its proofs, and what a kill leaves."""

import argparse
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

import merge
from tests.support.processes import disk_for, other_writer
from tests.support.tiny_models import tiny_tokenizer, write_tiny_adapter
from tuner.inference import generation, judging
from tuner.inference.probes import PROBES
from tuner.model import folders, loading
from tuner.system import signals
from tuner.system.errors import UserError
from tuner.training import merge_proof, model_card

ROOT = Path(__file__).resolve().parents[2]
RECORD = {
    "rows": {"all": 70},
    "data_sha256": "ab" * 32,
    "bits": 4,
    "kept_step": 36,
    "steps": 40,
    "settings": {"lora_r": 16, "data": "secret.json"},
    "versions": {"torch": "2.13.0"},
}


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    folder = write_tiny_adapter(tmp_path_factory.mktemp("adapter") / "qlora_output", tiny_model)
    (folder / "run.json").write_text(json.dumps(RECORD))
    return folder


def run(adapter, output, overwrite=False):
    merge.run(argparse.Namespace(adapter=str(adapter), output=str(output), overwrite=overwrite))


@pytest.fixture(scope="module")
def merged(adapter, tmp_path_factory):
    output = tmp_path_factory.mktemp("merged") / "tiny-merged"
    run(adapter, output)
    return output


def weights(folder):
    return {k: v for path in folders.weight_files(folder) for k, v in load_file(path).items()}


# ------------------------------------------------------------------------------------------- weights


def test_a_merged_weight_is_base_and_delta_worked_out_in_float64(tiny_model, adapter, merged):
    before, after = weights(tiny_model), weights(merged)
    lora = load_file(adapter / "adapter_model.safetensors")
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == len(lora) / 2 == 2 * 7
    for name in changed:
        tail = name[name.index("layers.") : -len(".weight")]
        (a,) = (v.double().numpy() for k, v in lora.items() if f"{tail}.lora_A" in k)
        (b,) = (v.double().numpy() for k, v in lora.items() if f"{tail}.lora_B" in k)
        delta = numpy.zeros((b.shape[0], a.shape[1]))
        for rank in range(16):
            delta += numpy.outer(b[:, rank], a[rank]) * 32 / 16
        exact = before[name].double().numpy() + delta
        # On a CPU the sum is made in fp32 and rounded once: half a unit in the last of bf16's 8 bits.
        spacing = 2.0 ** (numpy.floor(numpy.log2(numpy.abs(exact))) - 7)
        assert (numpy.abs(after[name].double().numpy() - exact) <= 0.5001 * spacing + 1e-7).all()


def test_the_folder_loads_bare_and_without_a_warning_and_answers_as_the_two(adapter, merged):
    script = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "assert model.dtype == torch.bfloat16 and tokenizer.chat_template\n"
        "assert model.config.get_text_config().use_cache\n"
        "assert model.generation_config.eos_token_id == [1, 106]\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", script, merged], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert not re.sub(r".*Loading weights.*", "", result.stderr).strip()

    asked = [[{"role": "user", "content": prompt}] for prompt, _ in PROBES]
    both, tokenizer, _ = generation.load_tuned(adapter, None, train_qlora.quantization_config)
    whole = loading.load_base(str(merged), None, "cpu", torch.float32).eval()
    answers = (
        generation.answer_all(both, tokenizer, asked[:1]),
        generation.answer_all(whole, tokenizer, asked[:1]),
    )
    assert answers[0][0].ids[:10] == answers[1][0].ids[:10]


def test_what_belongs_to_a_model_goes_along(tiny_model, merged):
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (merged / name).read_bytes() == (Path(tiny_model) / name).read_bytes()
    assert "ai.google.dev/gemma/terms" in (merged / "NOTICE").read_text()
    card = (merged / "README.md").read_text(encoding="utf-8")
    for fact in ("license: gemma", "ab" * 32, "in 4 bits, step 36 of 40", "lora_r 16", "torch 2.13.0"):
        assert fact in card
    assert "secret.json" not in card
    for weights in merged.glob("*.safetensors"):  # a server run by another user reads them
        assert weights.stat().st_mode == (merged / "config.json").stat().st_mode
    assert sorted(p.name for p in merged.parent.iterdir()) == ["tiny-merged"]


def test_terms_processor_and_the_comparisons_figures_go_along(tmp_path):
    base, aside = tmp_path / "base", tmp_path / "aside"
    base.mkdir()
    aside.mkdir()
    for name in ("GEMMA_TERMS.html", "NOTICE.md", "processor_config.json", "preprocessor_config.json"):
        (base / name).write_text(name)
    for name in ("model.safetensors", "REVISION", "pickle.bin", "code.py"):
        (base / name).write_text(name)
    merge.copy_files(base, aside)
    assert sorted(p.name for p in aside.iterdir()) == sorted(
        ["GEMMA_TERMS.html", "NOTICE", "NOTICE.md", "processor_config.json", "preprocessor_config.json"]
    )
    tuned = judging.rates(["right", "missed", "false", "right"], [True, True, False, False])
    comparison = {"bits": None, "passed": 5, "probes": [{}] * 6, "rows": {"tuned": tuned}}
    card = model_card.model_card("google/gemma-3-4b-it", None, {}, comparison)
    assert "- probes passed, base unquantised: 5 of 6\n" in card
    assert "1 of 2 calls right, 1 of 2 false calls, F1 0.50\n" in card
    for stranger in ({"rows": 3}, {"settings": []}, {"settings": {}, "versions": None}):
        strangers = model_card.model_card("google/gemma-3-4b-it", None, stranger, stranger)
        assert strangers == model_card.model_card("google/gemma-3-4b-it", None, {}, {})


# -------------------------------------------------------------------------------------------- proofs


def alter(folder, part, change):
    path = Path(folder, "model.safetensors")
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if part in name)
    tensors[name] = change(tensors[name])
    save_file({name: t for name, t in tensors.items() if t is not None}, path, metadata={"format": "pt"})


ALTERED = {
    "no delta": ("layers.1.mlp.up_proj", "old", "did not change"),
    "half the delta": ("layers.0.self_attn.q_proj", "half", "did not change by B·A·alpha/r"),
    "a norm": ("layers.0.input_layernorm", lambda t: t + 1, "has no adapter and changed"),
    "the sign of a zero": ("layers.0.input_layernorm", lambda t: -t, "has no adapter and changed"),
    "lost": ("layers.0.input_layernorm", lambda t: None, "have not the same tensors"),
    "fp32": ("layers.1.mlp.up_proj", lambda t: t.float(), "is torch.float32"),
}


@pytest.mark.parametrize("what", ALTERED)
def test_a_merge_that_went_wrong_is_found_and_not_kept(tiny_text_model, tmp_path, monkeypatch, capsys, what):
    adapter = write_tiny_adapter(tmp_path / "qlora_output", tiny_text_model)
    part, change, says = ALTERED[what]
    old = next(v for k, v in weights(tiny_text_model).items() if part in k)
    if change == "old":
        change = lambda new: old  # noqa: E731
    elif change == "half":
        change = lambda new: ((new.float() + old.float()) / 2).to(torch.bfloat16)  # noqa: E731
    copy_files = merge.copy_files

    def copy_and_alter(base, merged):
        copy_files(base, merged)
        alter(merged, part, change)

    monkeypatch.setattr(merge, "copy_files", copy_and_alter)
    monkeypatch.setattr(
        sys, "argv", ["merge.py", "--adapter", str(adapter), "--output", str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit) as exit:
        merge.main()
    assert exit.value.code == 1
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["qlora_output"]


def test_a_near_tie_is_shown_and_another_answer_is_refused(capsys):
    def given(*ids):
        return generation.Answer("", True, list(ids))

    tokenizer = tiny_tokenizer()
    before, after = [given(110, 111), given(110, 111)], [given(110, 111), given(110, 112)]
    tie = [[(110, 9.0), (0, 1.0)], [(111, 5.0), (112, 4.9)], [(106, 9.0), (0, 1.0)]]
    turned = [[(110, 9.0), (0, 1.0)], [(112, 5.0), (111, 4.9)], [(106, 9.0), (0, 1.0)]]
    assert merge.compare_answers(tokenizer, before, after, [tie, tie], [tie, turned]) == 1
    output = capsys.readouterr().out
    assert "probe 2 differs at token 2" in output
    assert output.count("5.000") == output.count("4.900") == 2
    turned[1] = [(112, 5.0), (111, 4.4)]
    with pytest.raises(UserError, match="answers otherwise"):
        merge.compare_answers(tokenizer, before, after, [tie, tie], [tie, turned])
    # One answer goes on where the other one ends.
    assert merge.compare_answers(tokenizer, [given(110)], [given(110, 111)], [tie], [tie]) == 0


# ------------------------------------------------------------------------------------------- folders


def refused(match, *arguments):
    with pytest.raises(UserError, match=match):
        merge.check_output(*arguments)


def test_a_folder_that_is_there_is_never_overwritten_unasked(merged, tmp_path):
    refused("is there; add --overwrite", merged, "base", "adapter", False)
    merge.check_output(merged, "base", "adapter", True)
    (tmp_path / "notes").mkdir()
    merge.check_output(tmp_path / "notes", "base", "adapter", False)
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    refused("is no model", tmp_path / "notes", "base", "adapter", True)
    refused("is the base or the adapter itself", merged, merged, "adapter", True)
    refused("is the base or the adapter itself", tmp_path / "notes", "base", tmp_path / "notes", True)


def test_a_place_that_cannot_be_written_to_is_refused(adapter, tmp_path):
    with pytest.raises(UserError, match="cannot be written to"):
        run(adapter, tmp_path / "none" / "out")


def test_on_a_full_disk_nothing_half_written_stays(adapter, tmp_path):
    with (
        disk_for(100_000),
        pytest.raises(UserError, match=r"cannot be written \(.*File too large.*\); free some"),
    ):
        run(adapter, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_second_merge_into_a_folder_is_refused(adapter, tmp_path):
    with other_writer(tmp_path / "out") as pid, pytest.raises(UserError, match=f"by process {pid}; wait"):
        run(adapter, tmp_path / "out")
    run(adapter, tmp_path / "out")  # that process was killed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_replaces_and_a_kill_between_the_renames_is_mended(adapter, merged, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(merged, output)
    (output / "old").touch()
    run(adapter, output, overwrite=True)
    assert not (output / "old").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    output.rename(tmp_path / "out.old")
    merge.check_output(output, "base", "adapter", True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_too_little_disk_or_memory_is_told_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    import psutil

    with pytest.raises(UserError, match="too little memory"):
        merge.choose_device(psutil.virtual_memory().total, tmp_path)
    assert "GB of memory on the CPU" in capsys.readouterr().out
    with pytest.raises(UserError, match="too little disk"):
        merge.choose_device(shutil.disk_usage(tmp_path).total, tmp_path)


def test_a_missing_adapter_is_one_line_and_exit_1(tmp_path):
    result = subprocess.run([sys.executable, ROOT / "merge.py"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "qlora_output is not there; train an adapter first: python train_qlora.py\n"


def merge_in_a_process(adapter, output):
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    run(adapter, output, overwrite=True)


@pytest.fixture(scope="module")
def processes():
    """Processes that have the libraries imported when they start."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "peft", "bitsandbytes", "merge", "test_merge"])
    return context


def merge_for_ever(adapter, output):
    def work(*_):
        while True:  # a single long sleep would not notice a signal that came just before it
            time.sleep(0.01)

    signals.exit_on_signals()
    merge_proof.prove_weights = work
    merge_in_a_process(adapter, output)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_clears_away_what_was_begun(processes, tiny_text_model, tmp_path, number):
    adapter = write_tiny_adapter(tmp_path / "qlora_output", tiny_text_model)
    process = processes.Process(target=merge_for_ever, args=(adapter, tmp_path / "out"))
    process.start()
    while not (tmp_path / "out.part/README.md").exists():  # all is written
        assert process.is_alive()
        time.sleep(0.05)
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == 128 + number
    assert [path.name for path in tmp_path.iterdir()] == ["qlora_output"]


def test_killed_at_twenty_random_moments_it_leaves_the_old_or_the_new(processes, tiny_text_model, tmp_path):
    adapter = write_tiny_adapter(tmp_path / "qlora_output", tiny_text_model)
    output = tmp_path / "out"
    run(adapter, output)
    new = {p.name: p.read_bytes() for p in output.iterdir()}

    def start():
        process = processes.Process(target=merge_in_a_process, args=(adapter, output))
        process.start()
        return process, time.monotonic()

    start()[0].join()  # the server is up and warm
    process, began = start()
    process.join()
    assert process.exitcode == 0
    duration = time.monotonic() - began
    moments = random.Random(0)
    killed, saw_half = 0, False
    for _ in range(20):
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        for name, content in {**new, "config.json": new["config.json"] + b" ", "old": b""}.items():
            (output / name).write_bytes(content)
        old = {p.name: p.read_bytes() for p in output.iterdir()}
        process, _ = start()
        time.sleep(moments.uniform(0, duration))
        process.kill()  # SIGKILL; nothing happens if it has ended
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        saw_half |= (tmp_path / "out.part").exists()
        if not output.exists():  # killed between the two renames: the next merge puts it back
            merge.check_output(output, tiny_text_model, adapter, True)
        assert {p.name: p.read_bytes() for p in output.iterdir()} in (old, new)
    assert killed >= 10
    assert saw_half
    run(adapter, output, overwrite=True)
    assert {p.name: p.read_bytes() for p in output.iterdir()} == new
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "qlora_output"]
