"""A stopped run goes on to the same adapter; what may not be resumed or overwritten is refused."""

import os
import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.support.training import adapter_bytes, at_step, names, resume, run_json, run_training, send
from tuner.system import signals
from tuner.training import checkpoint_state, loss_functions, memory_plan


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_finishes_the_step_keeps_it_and_says_how_to_go_on(
    arguments, undisturbed, monkeypatch, tmp_path, number, code
):
    before = signal.getsignal(number)
    with at_step(monkeypatch, 5, send(number)):
        exit_code, out, errors = run_training(*arguments, folder=tmp_path)
    assert exit_code == code
    assert signal.getsignal(number) == before
    assert "Traceback" not in errors
    assert "stopped    latest checkpoint: qlora_output/checkpoints/step-000005\n" in out
    command = re.search(r"^resume with: python train_qlora.py (.*)$", out, re.M)[1]
    assert command.split() == [*map(str, arguments), "--resume"]
    assert names(tmp_path) == ["qlora_output"]
    assert names(tmp_path / "qlora_output") == ["checkpoints"]

    code, out, _ = run_training(*command.split(), folder=tmp_path)
    assert code == 0
    assert "resumed    after step 5 of 8" in out
    assert re.findall(r"^epoch +(\d)", out, re.M) == ["3", "4"]
    output = tmp_path / "qlora_output"
    assert adapter_bytes(output) == adapter_bytes(undisturbed)
    one, other = run_json(output), run_json(undisturbed)
    assert one["resumed_at"] == [5]
    for key in ("losses", "evaluations", "kept_step", "settings", "tokens", "prompts_sha256"):
        assert one[key] == other[key], key
    assert (output / "loss.png").stat().st_size > 10_000


def test_stopped_without_any_checkpoint_it_says_how_to_start_again(arguments, monkeypatch, tmp_path):
    """None can be written, as on a full disk: there is nothing to resume."""

    def write_checkpoint(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_state, "write_checkpoint", write_checkpoint)
    with at_step(monkeypatch, 1, send(signal.SIGTERM)):
        code, out, _ = run_training(*arguments, folder=tmp_path)
    assert code == 143
    assert "the checkpoint of step 1 could not be written (No space left on device)" in out
    command = shlex.join(["python", "train_qlora.py", *map(str, arguments)])
    assert out.splitlines()[-2:] == ["stopped    without a checkpoint", f"start again with: {command}"]
    assert "resume" not in out
    assert names(tmp_path) == []


def test_stopped_three_times_over_it_ends_with_the_same_adapter(
    arguments, undisturbed, monkeypatch, tmp_path
):
    for step_of_this_run in (1, 3, 2):
        with at_step(monkeypatch, step_of_this_run, send(signal.SIGTERM)):
            more = ["--resume"] if (tmp_path / "qlora_output").exists() else []
            code, _, _ = run_training(*arguments, *more, folder=tmp_path)
        assert code == 143
    code, _, _ = resume(arguments, tmp_path)
    assert code == 0
    assert run_json(tmp_path / "qlora_output")["resumed_at"] == [1, 4, 6]
    assert adapter_bytes(tmp_path / "qlora_output") == adapter_bytes(undisturbed)


def test_an_evaluation_is_broken_off_and_made_up_for(arguments, monkeypatch, tmp_path):
    real = loss_functions.loss_and_predictions

    def ask_while_evaluating(model, batch, *rest):
        if not model.training:
            send(signal.SIGTERM)()
        return real(model, batch, *rest)

    # Two micro-batches of validation rows: the second one is not begun.
    monkeypatch.setattr(memory_plan, "MICRO_BATCH_TOKENS", 100)
    with monkeypatch.context() as patch:
        patch.setattr(loss_functions, "loss_and_predictions", ask_while_evaluating)
        code, out, _ = run_training(*arguments, folder=tmp_path)
    assert code == 143
    assert not re.search("^epoch", out, re.M)
    assert names(tmp_path / "qlora_output/checkpoints") == ["step-000002"]
    code, out, _ = resume(arguments, tmp_path)
    assert code == 0
    assert re.findall(r"^epoch +(\d)", out, re.M) == ["1", "2", "3", "4"]
    assert run_training(*arguments, "--output", "other", folder=tmp_path)[0] == 0
    for key in ("losses", "evaluations"):
        assert run_json(tmp_path / "qlora_output")[key] == run_json(tmp_path / "other")[key]


def test_what_it_began_with_must_be_the_same_and_what_differs_is_named(
    arguments, stopped, tiny_text_model, few_rows
):
    folder = stopped
    kept = {p: p.read_bytes() for p in (folder / "qlora_output").rglob("*") if p.is_file()}
    rows = folder / "other.json"
    rows.write_text(few_rows.read_text().replace("?", "!", 1))
    model = Path(shutil.copytree(tiny_text_model, folder / "other"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] += 0.5
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    for changed, problem in [
        (["--data", rows], "the data changed"),
        (["--learning-rate", 1e-3], "learning_rate was 0.003 and is 0.001"),
        (["--epochs", 5, "--bits", 8], "bits was 4 and is 8, epochs was 4 and is 5"),
        (["--model", model], "the model changed"),
    ]:
        code, _, errors = resume(arguments, folder, *changed)
        assert code == 1
        assert errors.splitlines()[-1] == (
            f"qlora_output cannot be resumed: {problem}; restore what it began with, or start afresh "
            "with --overwrite"
        )
    assert {p: p.read_bytes() for p in (folder / "qlora_output").rglob("*") if p.is_file()} == kept


def test_nothing_to_resume_and_a_finished_run_are_reported(arguments, undisturbed, tmp_path):
    code, _, errors = resume(arguments, tmp_path)
    assert code == 1
    assert errors.startswith(
        "qlora_output has nothing to resume; start with: python train_qlora.py --rehearse "
    )
    assert "--resume" not in errors
    assert names(tmp_path) == []
    before = adapter_bytes(undisturbed)
    code, out, _ = resume(arguments, undisturbed.parent)
    assert code == 0
    assert out.startswith(
        "finished   the run in qlora_output is complete: there is nothing to resume\nnext  "
    )
    assert adapter_bytes(undisturbed) == before


def test_an_unfinished_run_is_not_overwritten_unasked(arguments, stopped, undisturbed):
    folder = stopped
    code, _, errors = run_training(*arguments, folder=folder)
    assert code == 1
    assert errors.startswith(
        "qlora_output holds an unfinished run (step-000005); resume with: python train_qlora.py "
    )
    assert " --resume; or add --overwrite to start afresh" in errors
    code, out, _ = run_training(*arguments, "--overwrite", folder=folder)
    assert code == 0
    assert "resumed" not in out
    assert adapter_bytes(folder / "qlora_output") == adapter_bytes(undisturbed)
    assert run_json(folder / "qlora_output")["resumed_at"] == []
    assert names(folder) == ["qlora_output"]


def test_resume_and_overwrite_exclude_each_other(tmp_path):
    code, _, errors = run_training("--resume", "--overwrite", folder=tmp_path)
    assert code == 2
    assert "not allowed with argument" in errors


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with signals.stop_requests() as stop_request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop_request
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # of a launcher, at once: no second one
            assert stop_request.signal == signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, before)
