"""A stopped run goes on to the same adapter; what may not be resumed or overwritten is refused."""

import hashlib
import os
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import merge
import train_qlora
from tests.support.scripts import run_main
from tests.support.training import (
    adapter_bytes,
    age_checkpoints,
    at_step,
    names,
    recipe,
    resume,
    run_json,
    run_training,
    send,
)
from tuner.system import output_folder, signals
from tuner.training import adapter_folder, checkpoint_state, loss_functions, memory_plan, resuming


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
    for key in ("losses", "evaluations", "settings", "tokens", "prompts_sha256"):
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


def test_a_run_that_an_earlier_version_began_goes_on(arguments, stopped, undisturbed):
    """Its evaluations say how many rows were right, and nothing of names."""
    age_checkpoints(stopped / "qlora_output")
    code, out, errors = resume(arguments, stopped)
    assert code == 0, errors
    assert "resumed    after step 5 of 8" in out
    assert adapter_bytes(stopped / "qlora_output") == adapter_bytes(undisturbed)
    evaluations = run_json(stopped / "qlora_output")["evaluations"]
    whole = run_json(undisturbed)["evaluations"]
    assert ["named" in e for e in evaluations] == [False, False, True, True]
    assert all(e.items() <= other.items() for e, other in zip(evaluations, whole, strict=True))


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
        (["--seed", 7], "seed was 42 and is 7"),
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


def test_a_finished_run_names_what_was_typed_differently_and_nothing_else(
    arguments, undisturbed, few_rows, tmp_path, monkeypatch
):
    output = shutil.copytree(undisturbed, tmp_path / "qlora_output")
    before = adapter_bytes(output)
    other = tmp_path / "other.json"
    other.write_text(few_rows.read_text().replace("?", "!", 1))
    crlf = tmp_path / "crlf.json"
    crlf.write_bytes(b"\xef\xbb\xbf" + few_rows.read_bytes().replace(b"\n", b"\r\n"))
    model = str(arguments[2])
    for typed, problem in [
        (["--epochs", 5, "--bits", 8], "bits was 4 and is 8, epochs was 4 and is 5; to train"),
        (["--learning-rate", 1e-3], "learning_rate was 0.003 and is 0.001; to train"),
        (["--data", other], "the data changed; to train"),
        (["--model", "google/gemma-3-4b-it"], f"model was {model[:59]}"),
    ]:
        code, out, errors = run_training("--data", few_rows, *typed, "--resume", folder=tmp_path)
        assert (code, out, errors.count("\n")) == (1, "", 1)
        assert errors.startswith(f"qlora_output holds a finished run: {problem}")
        command = shlex.join(["--data", str(few_rows), *map(str, typed)])
        assert errors.endswith(f"type: python train_qlora.py {command}\n")
    (tmp_path / "examples.json").write_bytes(other.read_bytes())  # the default, which was not typed
    for typed in ([], ["--epochs", 4, "--rehearse", "--model", f"{model}/"], ["--data", crlf]):
        code, out, errors = run_training(*typed, "--resume", folder=tmp_path)
        assert (code, errors) == (0, "")
        assert out.startswith("finished   the run in qlora_output is complete: there is nothing to resume\n")
    # A constant of the recipe is typed too, and rows may change in the file that was trained on.
    with monkeypatch.context() as patch:
        patch.setattr(train_qlora, "RECIPE", recipe(lora_r=8))
        assert "lora_r was 16 and is 8" in run_training("--resume", folder=tmp_path)[2]
    path = output / "run.json"
    path.write_text(path.read_text().replace(f'"data": "{few_rows}"', '"data": "examples.json"'))
    assert "the data changed" in run_training("--resume", folder=tmp_path)[2]
    assert adapter_bytes(output) == before


@pytest.mark.parametrize("form", ["CRLF and a BOM", "an array"])
def test_the_tokens_decide_whether_the_data_changed(arguments, stopped, undisturbed, few_rows, form):
    rows = stopped / "rows.json"
    lines = few_rows.read_text().splitlines()
    text = "\ufeff" + "\r\n".join(lines) if form == "CRLF and a BOM" else f"[{', '.join(lines)}]"
    rows.write_bytes(text.encode())
    code, out, errors = resume(arguments, stopped, "--data", rows)
    assert code == 0, errors
    assert "resumed    after step 5 of 8" in out
    assert adapter_bytes(stopped / "qlora_output") == adapter_bytes(undisturbed)
    run = run_json(stopped / "qlora_output")
    assert run["data_sha256"] == hashlib.sha256(rows.read_bytes()).hexdigest()
    assert run["rows_sha256"] == run_json(undisturbed)["rows_sha256"]


STRANGERS = (
    *(".DS_Store", "notes.txt", "Thumbs.db", "tokenizer_notes.txt", "adapter.part/mine", "mine/letter.txt"),
    *("checkpoints/.DS_Store", "checkpoints/.ipynb_checkpoints/a", "checkpoints/notes.txt"),
    *("checkpoints/step-000004.old/mine", "checkpoints/step-000006.part/mine", "checkpoints/step-12/mine"),
    *("checkpoints/step-000003/mine", "checkpoints/step-000004/mine", "checkpoints/step-000008/mine"),
)


def add_strangers(output):
    for name in STRANGERS:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("mine")


def strangers(output):
    """Return the files of add_strangers in a folder; x.1, a folder that made way, by its old name."""
    paths = [path for path in output.rglob("*") if path.is_file() and path.read_bytes() == b"mine"]
    return sorted(re.sub(r"(step-\d+)\.\d/", r"\1/", str(path.relative_to(output))) for path in paths)


def test_what_a_run_does_not_know_it_leaves_alone_and_goes_on(arguments, stopped, undisturbed):
    output = stopped / "qlora_output"
    add_strangers(output)
    code, out, errors = run_training(*arguments, folder=stopped)
    assert (code, out) == (1, "")
    assert errors.startswith("qlora_output holds an unfinished run (step-000005); resume with: ")
    code, out, errors = resume(arguments, stopped)
    assert code == 0, errors
    assert "damaged" not in out
    assert adapter_bytes(output) == adapter_bytes(undisturbed)
    assert strangers(output) == sorted(STRANGERS)
    assert resume(arguments, stopped)[0] == 0


def test_overwriting_removes_what_is_a_runs_and_nothing_else(arguments, stopped, undisturbed):
    output = stopped / "qlora_output"
    add_strangers(output)
    theirs = output / "checkpoints/step-000100"  # of another program, by the same name
    theirs.mkdir()
    (theirs / "manifest.json").write_text("{}")
    for name in ("adapter_model.safetensors", "run.json"):  # killed while it gave the files their names
        shutil.copyfile(undisturbed / name, output / name)
    before = names(output / "checkpoints")
    code, _, errors = run_training(*arguments, "--epochs", 1, "--overwrite", folder=stopped)
    assert code == 0, errors
    assert run_json(output)["steps"] == 2
    assert strangers(output) == sorted(STRANGERS)
    assert (theirs / "manifest.json").read_text() == "{}"
    gone = set(before) - set(names(output / "checkpoints"))
    assert gone == {"step-000005"}  # in step-000004 is a file of the user
    assert names(output / "checkpoints/step-000004") == ["mine"]


@pytest.mark.parametrize("place", ["a link", "a dangling link", "a mount point"])
def test_the_folder_that_a_path_leads_to_is_written_and_keeps_the_adapters(
    arguments, undisturbed, monkeypatch, tmp_path, place
):
    disk, output = tmp_path / "disk/run", tmp_path / "here/qlora_output"
    output.parent.mkdir()
    disk.parent.mkdir()
    if place != "a dangling link":
        shutil.copytree(undisturbed, disk)
        (disk / "lost+found").mkdir()
    if place == "a mount point":
        monkeypatch.setattr(os.path, "ismount", lambda path: path == disk)
    output.symlink_to(disk)
    for number in (1, 2):
        code, out, errors = run_training(*arguments, "--epochs", 1, folder=output.parent)
        assert code == 0, errors
        assert output.is_symlink()
        assert names(output.parent) == ["qlora_output"]
        assert run_json(disk)["steps"] == 2
        if place == "a dangling link" and number == 1:
            assert "previous" not in out
            continue
        previous = disk / f"run.{number}" if place == "a mount point" else disk.with_name("run.1")
        assert f"previous adapter moved to {previous}\n" in out
        if number == 1:
            assert adapter_bytes(previous) == adapter_bytes(undisturbed)
            assert run_json(previous)["steps"] == 8
        if place != "a mount point":
            assert names(disk.parent) == ["run", "run.1"]
            return
    assert {"lost+found", "run.1", "run.2"} < set(names(disk))
    assert names(disk / "checkpoints") == ["step-000002"]


def test_an_adapter_moves_within_a_mount_point_whenever_that_is_killed(undisturbed, monkeypatch, tmp_path):
    disk = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    adapter = {path.name: path.read_bytes() for path in disk.iterdir() if path.is_file()}
    (disk / "run.1").mkdir()
    (disk / "run.1/mine").write_text("mine")
    monkeypatch.setattr(os.path, "ismount", lambda path: path == disk)
    rename, moved = Path.rename, []

    def rename_or_stop(path, target):
        if len(moved) == stop:
            raise KeyboardInterrupt
        moved.append(path.name)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_or_stop)
    for number in range(len(adapter)):  # each time a file more
        stop = number
        with pytest.raises(KeyboardInterrupt):
            adapter_folder.move_aside(disk)
        assert adapter_folder.is_finished(disk)
    stop = None
    assert adapter_folder.move_aside(disk) == disk / "run.2"
    assert {path.name: path.read_bytes() for path in (disk / "run.2").iterdir()} == adapter
    output_folder.mark(disk / "run.2")  # killed right before its mark was removed
    for name, data in adapter.items():
        (disk / name).write_bytes(data)
    assert adapter_folder.move_aside(disk) == disk / "run.3"
    assert names(disk / "run.1") == ["mine"]


@pytest.mark.parametrize("marked", [True, False])
def test_a_run_killed_before_its_first_checkpoint_can_be_started_again(arguments, tmp_path, marked):
    output = tmp_path / "qlora_output"
    adapter_folder.prepare(output)
    if marked:
        (output / "notes.txt").write_text("mine")
    else:  # killed between making the folder and marking it
        (output / "checkpoints/.tuner").unlink()
    code, _, errors = run_training(*arguments, "--epochs", 1, folder=tmp_path)
    assert code == 0, errors
    assert not marked or (output / "notes.txt").read_text() == "mine"
    assert names(output / "checkpoints") == ["step-000002"]


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


def test_the_command_for_an_unfinished_run_resumes_it_whatever_was_typed(arguments, stopped, undisturbed):
    other = ("--epochs", "9", "--learning-rate", "1", "--bits", "8")
    _, _, errors = run_training(*arguments, *other, folder=stopped)
    command = re.search(r"; resume with: python train_qlora\.py (.*); or add --overwrite", errors)[1]
    _, _, merge_errors = run_main(merge.main, folder=stopped)
    assert merge_errors == (
        f"qlora_output holds an unfinished run; resume with: python train_qlora.py {command}\n"
    )
    code, out, _ = run_training(*shlex.split(command), folder=stopped)
    assert code == 0
    assert "resumed    after step 5 of 8" in out
    assert adapter_bytes(stopped / "qlora_output") == adapter_bytes(undisturbed)


def test_a_run_without_a_checkpoint_is_said_to_start_again(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_qlora.py", "--output", "my out"])
    assert resuming.way_on(tmp_path) == "start again with: python train_qlora.py --output 'my out'"
    (tmp_path / "checkpoints/step-000004").mkdir(parents=True)
    (tmp_path / "checkpoints/step-000004/manifest.json").touch()
    assert resuming.way_on(tmp_path) == "resume with: python train_qlora.py --output 'my out' --resume"


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
