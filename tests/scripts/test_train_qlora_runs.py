"""The script as it is typed: its flags, what it prints and leaves, and what it refuses, on a tiny Gemma 3."""

import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import train_qlora
from tests.support.scripts import run_main
from tests.support.training import (
    ROOT,
    age_checkpoints,
    fake_cuda,
    recipe,
    run_json,
    run_training,
    start_training,
    without_dropout,
)
from tuner.data.splitting import split_rows
from tuner.system import devices, hardware
from tuner.system.errors import UserError
from tuner.training import adapter_folder

REHEARSE = ["--rehearse", "--batch-size", 16, "--data", ROOT / "examples.json"]


@pytest.fixture(scope="module")
def arguments(tiny_text_model):
    return [*REHEARSE, "--model", tiny_text_model, "--epochs", 2, "--bits", 8, "--learning-rate", 3e-3]


@pytest.fixture(scope="module")
def finished_run(arguments, tmp_path_factory):
    """The folder of a run, a process of its own, and the lines that it printed."""
    folder = tmp_path_factory.mktemp("run")
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = start_training([*arguments, "--output", "out"], folder, **streams)
    printed = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 0, printed
    return folder, re.split(r"[\r\n]+", printed)


def test_a_run_says_what_it_does_and_where_the_result_is(finished_run, tiny_text_model):
    _, lines = finished_run
    for line in (
        rf"rows       200 of {ROOT}/examples.json: 100 with a call, 100 without",
        r"tokens     \d+ total, \d+ trained, longest row \d+",
        rf"model      {tiny_text_model} in 8 bits on the CPU",
        r"trainable params: 32,768 \|\| all params: 139,968 \|\| trainable%: 23.4111",
        r"training   180 training rows, batch size 16; 20 validation rows",
        r"epoch  1/2  step  12  training loss \d\.\d+  validation loss \d\.\d+  "
        r"validation accuracy \(call/text\) \d+/20",
        r"epoch  2/2  step  24  training loss \d\.\d+  validation loss \d\.\d+  "
        r"validation accuracy \(call/text\) \d+/20",
        r"memory     peak RAM \d\.\d\d GiB",
        r"time       [\d.]+ s loading, [\d.]+ s training",
        r"saved      out; loss curves: out/loss.png",
        r"next       python compare.py --adapter out",
    ):
        assert any(re.fullmatch(line, printed) for printed in lines), line
    assert "warn" not in "\n".join(lines).lower()
    assert any(line.startswith("training: 100%") and line.endswith("]") for line in lines)  # beside the bar


def test_a_run_leaves_a_whole_folder(finished_run, tiny_text_model):
    folder, _ = finished_run
    assert {path.name for path in (folder / "out").iterdir()} >= {
        *["adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json"],
        *["run.json", "loss.png"],
    }
    assert [path.name for path in folder.iterdir()] == ["out"]
    assert (folder / "out/loss.png").read_bytes()[:4] == b"\x89PNG"
    weights = load_file(folder / "out/adapter_model.safetensors")
    assert len(weights) == 2 * 14
    assert all(tensor.any() for tensor in weights.values())
    config = json.loads((folder / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == tiny_text_model
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["bias"]) == (
        16,
        32,
        0.1,
        "none",
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_text_model)
    ids = torch.tensor([[2, 105, 8, 9]])
    plain = base(ids).logits
    assert not torch.allclose(PeftModel.from_pretrained(base, folder / "out")(ids).logits, plain)

    run = json.loads((folder / "out/run.json").read_text())
    assert run["model"] == tiny_text_model
    assert run["revision"] is None
    assert run["bits"] == 8
    assert run["data_sha256"] == hashlib.sha256((ROOT / "examples.json").read_bytes()).hexdigest()
    assert run["rows"] == {"all": 200, "training": 180, "validation": 20}
    assert run["tokens"] > run["trained_tokens"] > 0
    assert len(run["losses"]) == run["steps"] == 24
    assert [e["step"] for e in run["evaluations"]] == [12, 24]
    assert run["trainable_parameters"] == 32_768
    assert run["settings"]["learning_rate"] == 3e-3
    assert run["settings"]["lora_dropout"] == 0.1
    assert run["device"] == "the CPU"
    assert set(run["versions"]) >= {"python", "torch", "transformers", "peft", "bitsandbytes"}
    assert run["seconds"]["training"] > 0
    assert run["peak_memory_gib"]["resident"] > 0


def test_a_second_run_keeps_the_first_ones_adapter_and_repeats_its_losses(finished_run, arguments):
    folder, _ = finished_run
    first = (folder / "out/adapter_model.safetensors").read_bytes()
    losses = run_json(folder / "out")["losses"]
    code, printed, _ = run_training(*arguments, "--output", "out", folder=folder)
    assert code == 0
    assert "previous adapter moved to out.1\n" in printed
    assert (folder / "out.1/adapter_model.safetensors").read_bytes() == first
    assert (folder / "out/adapter_model.safetensors").read_bytes() == first
    assert run_json(folder / "out")["losses"] == losses
    shutil.rmtree(folder / "out.1")


def test_in_bf16_every_step_uses_the_weights_of_the_one_before(
    finished_run, arguments, monkeypatch, tmp_path
):
    """Autocast around more than a step would go on with the first step's weights, and the loss would stay."""
    monkeypatch.setattr(devices, "CPU_DTYPE", torch.bfloat16)
    code, _, _ = run_training(*arguments, "--output", "bf16", folder=tmp_path)
    assert code == 0
    assert run_json(tmp_path / "bf16")["compute_dtype"] == "bfloat16"
    fp32, bf16 = (run_json(folder)["losses"] for folder in (finished_run[0] / "out", tmp_path / "bf16"))
    assert bf16 == pytest.approx(fp32, rel=0.01)
    assert fp32[-1] < 0.95 * fp32[0]


def test_two_processes_give_the_losses_of_one(arguments, monkeypatch, tmp_path):
    """Without dropout, whose masks belong to a process, the losses are the same numbers."""
    arguments = [*arguments, "--bits", 4]
    with monkeypatch.context() as patch:
        without_dropout(patch)
        assert run_training(*arguments, "--output", "one", folder=tmp_path)[0] == 0
    script = tmp_path / "undropped.py"
    script.write_text(
        f"import dataclasses, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import train_qlora\n"
        "train_qlora.RECIPE = dataclasses.replace(train_qlora.RECIPE, lora_dropout=0.0)\n"
        "train_qlora.main()\n"
    )
    # --multi_gpu starts the processes as on GPUs; with --cpu accelerate starts just one, without MPI.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0"]  # a free one
    result = subprocess.run(
        [*launch, script, *map(str, arguments), "--output", "two"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("epoch  2/2") == 1
    one, two = (run_json(tmp_path / name) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    for alone, together in zip(one["evaluations"], two["evaluations"], strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-4)
        assert together["right"] == alone["right"]
        assert {**together, "loss": None} == {**alone, "loss": None}


@pytest.fixture(scope="module")
def bank_run(tiny_text_model, tmp_path_factory):
    """(folder, arguments, rows, what was printed) of a run on short rows of the example with four tools."""
    folder = tmp_path_factory.mktemp("bank")
    lines = sorted((ROOT / "examples/bank/rows.jsonl").read_text().splitlines(), key=len)
    called = [line for line in lines if '"tool_calls"' in line]
    general = [line for line in lines if '"tool_calls"' not in line]
    (folder / "rows.jsonl").write_text("\n".join(called[:24] + general[:24]))
    arguments = ["--rehearse", "--model", tiny_text_model, "--data", folder / "rows.jsonl", "--epochs", 2]
    arguments += ["--batch-size", 16]
    arguments += ["--learning-rate", 1e-2]
    code, printed, errors = run_training(*arguments, folder=folder)
    assert code == 0, errors
    return folder, arguments, train_qlora.load_data(folder / "rows.jsonl"), printed


def test_several_tools_with_arguments_are_judged_in_three_steps(bank_run):
    folder, _, rows, printed = bank_run
    held_out = split_rows(rows, train_qlora.RECIPE)[1]
    tags = [re.findall('<tool_call name="([^"]+)', rows[i]["messages"][-1]["content"]) for i in held_out]
    calls, tools = sum(map(bool, tags)), len({name for names in tags for name in names})
    assert calls >= 2 <= tools
    run = run_json(folder / "qlora_output")
    assert run["validation_calls"] == {"rows": calls, "tools": tools, "arguments": True}
    counted = re.findall(
        r"^epoch +(\d)/2  step +(\d+)  training loss \d\.\d+  validation loss (\d\.\d+)  "
        rf"validation decision (\d)/{len(held_out)}, name (\d)/{calls}, arguments (\d)/{calls}$",
        printed,
        re.M,
    )
    assert len(counted) == 2
    for e, numbers in zip(run["evaluations"], counted, strict=True):
        assert set(e) == {"epoch", "step", "loss", "decided", "named", "right", "general"}
        assert e["decided"] >= e["named"] >= e["right"] >= e["general"] >= 0
        shown = (e["epoch"], e["step"], f"{e['loss']:.3f}", e["decided"], e["named"] - e["general"])
        assert tuple(map(str, (*shown, e["right"] - e["general"]))) == numbers
    assert (folder / "qlora_output/loss.png").read_bytes()[:4] == b"\x89PNG"


def test_an_earlier_versions_checkpoint_of_such_rows_is_refused_in_one_line(bank_run, tmp_path):
    folder, arguments, _, _ = bank_run
    shutil.copytree(folder / "qlora_output/checkpoints", tmp_path / "qlora_output/checkpoints")
    age_checkpoints(tmp_path / "qlora_output")
    code, _, errors = run_training(*arguments, "--resume", folder=tmp_path)
    assert code == 1
    last = errors.splitlines()[-1]
    assert last.startswith(
        "the checkpoint of step 6 does not fit (an earlier version wrote it, which counted "
    )
    assert "no names); start afresh with --overwrite" in last
    assert "Traceback" not in errors


def test_a_learning_rate_that_explodes_stops_with_the_step_and_writes_nothing(arguments, tmp_path):
    code, _, errors = run_training(
        *arguments, "--bits", 4, "--epochs", 3, "--learning-rate", 1e30, folder=tmp_path
    )
    assert code == 1
    assert re.search(
        r"^step [2-4]: the (loss|gradient|validation loss) .* (explodes|is not finite); most likely the "
        r"learning rate 1e\+30 is too high: .* --learning-rate 1e\+29; no checkpoint was written yet$",
        errors,
        re.M,
    )
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------- what is refused


def test_bad_rows_are_reported_at_once_and_nothing_is_loaded(tmp_path):
    (tmp_path / "rows.json").write_text('{"messages": []}\n\n{"messages": [}\n')
    script = [
        sys.executable,
        "-X",
        "importtime",
        ROOT / "train_qlora.py",
        "--rehearse",
        "--data",
        "rows.json",
    ]
    result = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
    assert [line.split(": ")[0] for line in lines] == ["rows.json:1", "rows.json:3"]
    assert result.stdout == ""
    imported = set(re.findall(r"\| +(\w+)$", result.stderr, re.M))
    assert "tqdm" in imported
    assert not imported & {"torch", "transformers", "datasets", "bitsandbytes", "peft", "matplotlib"}


def test_without_a_gpu_one_line_and_exit_1(monkeypatch, tmp_path):
    fake_cuda(monkeypatch, available=False, cuda=None)
    monkeypatch.setattr(hardware, "has_driver", lambda: False)
    code, _, errors = run_training("--data", ROOT / "examples.json", folder=tmp_path)
    assert code == 1
    assert errors.count("\n") == 1
    assert "--rehearse" in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--bits", "5"], "--bits: invalid choice: 5"),
        (["--epochs", "0"], "--epochs: '0': expected a whole number ≥ 1"),
        (["--seed", "0"], "--seed: '0': expected a whole number ≥ 1"),
        (["--learning-rate", "nan"], "--learning-rate: 'nan': expected a number > 0"),
        (["--memory", "-1"], "--memory: '-1': expected a number > 0"),
        (["--memory", "8", "--rehearse"], "--memory limits GPU memory; --rehearse runs on the CPU"),
        (["--fp16"], "unrecognized arguments: --fp16"),
    ],
)
def test_wrong_arguments_exit_2(tmp_path, arguments, problem):
    code, out, errors = run_training(*arguments, folder=tmp_path)
    assert (code, out) == (2, "")
    assert problem in errors


def test_an_output_that_is_no_adapters_is_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letters.txt").write_text("dear")
    (tmp_path / "other/checkpoints").mkdir(parents=True)
    (tmp_path / "other/letters.txt").write_text("dear")
    (tmp_path / "theirs/checkpoints/epoch-1").mkdir(parents=True)
    for output in ("mine", "other", "theirs"):
        code, _, errors = run_training(*REHEARSE, "--overwrite", "--output", output, folder=tmp_path)
        assert code == 1
        assert errors == f"{output} exists and holds no adapter; name another folder with --output\n"
    code, _, errors = run_training(*REHEARSE, "--output", "no/such/place", folder=tmp_path)
    assert code == 1
    assert "no/such is not writable" in errors
    assert (tmp_path / "mine/letters.txt").read_text() == "dear"
    assert (tmp_path / "other/letters.txt").read_text() == "dear"


def test_an_output_that_can_be_no_folder_of_a_run_is_one_line(finished_run, tmp_path):
    checkpoint = next((finished_run[0] / "out/checkpoints").iterdir())
    (tmp_path / "file").touch()
    for output, problem in [
        ("", '"" names no folder; name another folder with --output'),
        (".", ". is the folder you are in, or one around it; name a folder in it with --output"),
        ("/", "/ is the folder you are in, or one around it; name a folder in it with --output"),
        ("~/out", f"~/out would be a folder of the name ~ here; write {Path.home()}/out"),
        ("file", "file is a file; name another folder with --output"),
        (checkpoint, f"{checkpoint} is a checkpoint of another run; name another folder with --output"),
    ]:
        for flag in ("--resume", "--overwrite"):
            result = run_training(*REHEARSE, flag, "--output", output, folder=tmp_path)
            assert result == (1, "", f"{problem}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_names_that_are_no_text_are_trained_on_and_to(arguments, tmp_path):
    data, output = (os.fsdecode(name) for name in (b"r\xff.json", b"o\xff"))
    shutil.copyfile(ROOT / "examples.json", tmp_path / data)
    code, out, errors = run_training(
        *arguments, "--epochs", 1, "--data", data, "--output", output, folder=tmp_path
    )
    assert code == 0, errors
    assert "rows       200 of r\ufffd.json:" in out
    assert run_json(tmp_path / output)["settings"]["data"] == data


def test_rows_are_read_once_from_a_pipe(arguments, tmp_path):
    data = (ROOT / "examples.json").read_bytes()
    reader, writer = os.pipe()
    os.write(writer, data)  # a pipe holds 64 KiB
    os.close(writer)
    path = f"/dev/fd/{reader}"
    code, out, errors = run_training(*arguments, "--epochs", 1, "--data", path, folder=tmp_path)
    os.close(reader)
    assert code == 0, errors
    assert f"rows       200 of {path}:" in out
    assert run_json(tmp_path / "qlora_output")["data_sha256"] == hashlib.sha256(data).hexdigest()


def test_rows_that_change_after_they_were_read_are_recorded_as_they_were(arguments, monkeypatch, tmp_path):
    path, load = tmp_path / "rows.json", train_qlora.load_data
    data = (ROOT / "examples.json").read_bytes()
    path.write_bytes(data)

    def load_and_change(data_path):
        rows = load(data_path)
        path.write_bytes(data[:100])
        return rows

    monkeypatch.setattr(train_qlora, "load_data", load_and_change)
    with monkeypatch.context() as patch:
        patch.setattr(train_qlora, "RECIPE", recipe(max_tokens=60))
        code, _, errors = run_training(*arguments, "--data", path, folder=tmp_path)
    assert code == 1
    assert re.match(r"\S+/rows\.json:\d+: the row has \d+ tokens", errors)
    path.write_bytes(data)
    code, _, errors = run_training(*arguments, "--epochs", 1, "--data", path, folder=tmp_path)
    assert code == 0, errors
    assert run_json(tmp_path / "qlora_output")["data_sha256"] == hashlib.sha256(data).hexdigest()


def test_a_model_that_is_not_whole_is_refused(tmp_path):
    (tmp_path / "half").mkdir()
    code, _, errors = run_training(*REHEARSE, "--model", "./half", folder=tmp_path)
    assert code == 1
    assert "./half is not a complete model folder (config.json missing)" in errors


def test_a_model_whose_weights_are_cut_is_refused(tmp_path, tiny_text_model):
    folder = Path(shutil.copytree(tiny_text_model, tmp_path / "cut"))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    code, _, errors = run_training(*REHEARSE, "--model", "./cut", folder=tmp_path)
    assert code == 1
    assert re.search(r"^\./cut is damaged \(model.safetensors: .*\); rename it, and download", errors, re.M)


def test_a_hub_model_that_cannot_be_fetched_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    code, _, errors = run_training(*REHEARSE, "--model", "google/gemma-3-4b-it", folder=tmp_path)
    assert code == 1
    assert errors.startswith("google/gemma-3-4b-it: HF_HUB_OFFLINE")
    assert errors.count("\n") == 1


def test_too_little_disk_is_one_line(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=10**8)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"0.10 GB of free disk, the run may need 1.5"):
        adapter_folder.check_output("out", resume=False)
    adapter_folder.check_output("out", resume=True)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            1,
            "GPU out of memory; close what else runs on it (nvidia-smi), train with --bits 4 or shorter "
            "rows, or use a larger GPU; no adapter was written",
        ),
        (KeyboardInterrupt(), 130, "stopped before training began"),
    ],
)
def test_a_full_gpu_and_ctrl_c_before_training_are_one_line(monkeypatch, tmp_path, error, code, line):
    def fail(*_):
        raise error

    monkeypatch.setattr(adapter_folder, "check_output", fail)

    def script():
        runpy.run_path(str(ROOT / "train_qlora.py"), run_name="__main__")

    exit_code, out, errors = run_main(script, "--data", ROOT / "examples.json", folder=tmp_path)
    assert (exit_code, out, errors.strip()) == (code, "", line)


def test_the_default_model_is_the_folder_if_it_is_there_else_the_hubs(tmp_path, tiny_text_model):
    def help_text():
        code, out, _ = run_training("--help", folder=tmp_path)
        assert code == 0
        return " ".join(out.split())

    assert "(default: google/gemma-3-4b-it)" in help_text()
    (tmp_path / "gemma-3-4b-it").symlink_to(tiny_text_model)
    assert "(default: ./gemma-3-4b-it)" in help_text()
