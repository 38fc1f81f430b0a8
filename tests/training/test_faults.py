"""Full memory, full disks, losses that explode, a second run in the folder: what was paid for is kept.

Every row of the table in docs/resuming.md is a test: here, in test_resuming.py, test_checkpoints.py and
test_kills.py, or in those of merge.py and download_model.py.
"""

import re
import shutil
import subprocess

import huggingface_hub
import pytest
from safetensors.torch import load

import check
import compare
import merge
import train_qlora
from tests.support.processes import disk_for, other_writer
from tests.support.scripts import run_main
from tests.support.training import (
    adapter_bytes,
    at_step,
    memory_for,
    names,
    resume,
    run_json,
    run_training,
    without_dropout,
)
from tuner.training import adapter_folder, adapter_weights, checkpoint_state, checkpoints


def test_where_memory_is_full_the_micro_batch_is_halved_and_the_gradient_is_the_same(
    arguments, monkeypatch, tmp_path
):
    without_dropout(monkeypatch)
    code, out, _ = run_training(*arguments, "--output", "roomy", folder=tmp_path)
    assert code == 0
    assert "out of memory" not in out
    with memory_for(monkeypatch, 300):
        code, out, _ = run_training(*arguments, "--output", "full", folder=tmp_path)
    assert code == 0
    sizes = re.findall(
        r"^memory     GPU out of memory at (\d+) tokens; retrying this step with (\d+)$", out, re.M
    )
    assert len(sizes) >= 2
    assert all(int(after) <= int(before) / 2 for before, after in sizes)
    roomy, full = run_json(tmp_path / "roomy"), run_json(tmp_path / "full")
    assert full["losses"] == pytest.approx(roomy["losses"], rel=1e-5)
    assert full["evaluations"] == [
        {**e, "loss": pytest.approx(e["loss"], rel=1e-5)} for e in roomy["evaluations"]
    ]


def test_at_one_row_it_gives_up_with_the_numbers_and_what_to_change(arguments, monkeypatch, tmp_path):
    with memory_for(monkeypatch, 10):
        code, _, errors = run_training(*arguments, folder=tmp_path)
    assert code == 1
    assert re.fullmatch(
        r"GPU out of memory with one row of \d+ tokens \(CUDA out of memory. Tried to allocate 20.00 "
        r"MiB.\); train with --bits 4, close what else runs on it \(nvidia-smi\), shorten that row, or take "
        r"a larger GPU; no checkpoint was written yet",
        errors.splitlines()[-1],
    )
    assert names(tmp_path) == []


def test_a_checkpoint_that_cannot_be_written_is_reported_and_training_goes_on(
    arguments, undisturbed, monkeypatch, tmp_path
):
    real = checkpoints.write_checkpoint
    then = []

    def write_checkpoint(output, config, manifest, files):
        if manifest["step"] != 4:
            return real(output, config, manifest, files)
        with disk_for(200_000):  # the adapter has 135 kB, the optimizer 285
            try:
                return real(output, config, manifest, files)
            finally:
                then.extend(names(tmp_path / "qlora_output/checkpoints"))

    monkeypatch.setattr(checkpoint_state, "write_checkpoint", write_checkpoint)
    code, out, _ = run_training(*arguments, folder=tmp_path)
    assert code == 0
    assert out.count("warning    the checkpoint of step 4 could not be written (File too large)") == 1
    assert then == ["step-000002"]
    assert "step-000008" in names(tmp_path / "qlora_output/checkpoints")
    assert adapter_bytes(tmp_path / "qlora_output") == adapter_bytes(undisturbed)


def test_an_adapter_that_cannot_be_written_is_reported_with_the_amount_and_resumed(
    arguments, undisturbed, monkeypatch, tmp_path
):
    real = adapter_weights.write_adapter

    def write(*args):
        with disk_for(100_000):
            return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(adapter_weights, "write_adapter", write)
        code, _, errors = run_training(*arguments, folder=tmp_path)
    assert code == 1
    assert re.search(
        r"^qlora_output: the adapter could not be written \(File too large\); it takes 1 MB, and \d+ MB are "
        r"free; free some, then resume with: python train_qlora.py .* --resume$",
        errors,
        re.M,
    )
    assert names(tmp_path / "qlora_output") == ["checkpoints"]
    code, out, _ = resume(arguments, tmp_path)
    assert code == 0
    assert "resumed    after step 8 of 8" in out
    assert adapter_bytes(tmp_path / "qlora_output") == adapter_bytes(undisturbed)


def test_a_full_disk_of_its_own(arguments, undisturbed, tmp_path):
    """A small filesystem, where this process may mount one: all checkpoints fail, then the adapter."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("no filesystem can be mounted here")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(adapter_folder, "DISK_NEEDED", 0)
            code, out, errors = run_training(*arguments, "--output", disk / "output", folder=tmp_path)
        assert code == 1
        assert out.count("could not be written (No space left on device); training goes on without it") == 4
        assert (
            "the adapter could not be written (No space left on device); it takes 1 MB, and 0 MB are"
            in errors
        )
        assert "free some, then start again with: python train_qlora.py " in errors
        assert not list(disk.rglob("*.part"))
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    ("loss", "problem"),
    [(float("nan"), "is not finite"), (float("inf"), "is not finite"), (40.0, "explodes")],
)
def test_a_loss_that_is_not_finite_or_explodes_stops_and_the_last_checkpoint_stays(
    arguments, monkeypatch, tmp_path, capsys, loss, problem
):
    with at_step(monkeypatch, 5, lambda: loss):
        code, _, errors = run_training(*arguments, folder=tmp_path)
    assert code == 1
    assert errors.splitlines()[-1] == (
        f"step 5: the loss ({loss:.4g}) {problem}; most likely the learning rate 0.003 is too high: start "
        "afresh with --overwrite --learning-rate 0.0003; the last checkpoint is "
        "qlora_output/checkpoints/step-000004"
    )
    checkpoint = checkpoints.newest(tmp_path / "qlora_output")
    assert capsys.readouterr().out == ""
    assert checkpoint.step == 4
    assert all(t.isfinite().all() for t in load(checkpoint.files["adapter_model.safetensors"]).values())


def test_a_second_run_in_a_folder_is_refused_and_a_dead_ones_lock_is_taken_over(arguments, tmp_path):
    with other_writer(tmp_path / "qlora_output") as pid:
        code, out, errors = run_training(*arguments, folder=tmp_path)
        assert (code, out) == (1, "")
        assert errors == f"qlora_output is being written by process {pid}; wait until it has finished\n"
        assert names(tmp_path) == [".qlora_output.tuner.lock"]
    assert names(tmp_path) == [".qlora_output.tuner.lock"]  # it was killed
    code, _, _ = run_training(*arguments, folder=tmp_path)
    assert code == 0
    assert names(tmp_path) == ["qlora_output"]


TOKEN = "hf_PLANTEDplantedPLANTEDplanted012345"


def test_a_token_is_in_nothing_that_is_printed_or_written(arguments, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert huggingface_hub.get_token() == TOKEN
    data, model = arguments[4], arguments[2]
    for name in ("heldout.json", "probes.json"):
        shutil.copyfile(data, tmp_path / name)
    for script, flags, code in [
        (train_qlora, arguments, 0),
        (train_qlora, ["--rehearse", "--model", "google/no-such-model", "--data", data, "--output", "no"], 1),
        (compare, [], 1),  # the tiny model calls nothing
        (merge, ["--output", "merged"], 0),
        (check, ["--data", data, "--model", model], 0),
    ]:
        exit_code, out, errors = run_main(script.main, *flags, folder=tmp_path)
        assert exit_code == code, errors
        assert TOKEN not in out + errors
    assert (tmp_path / "merged/README.md").exists()
    assert (tmp_path / "qlora_output/compare.json").exists()
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path
