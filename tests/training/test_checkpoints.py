"""Whatever ends a run, what was paid for is kept, and nothing half written passes for whole.

Every row of README.md's table of faults is a test here (or in test_merge.py and test_download_model.py).
"""

import hashlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

import check
import compare
import merge
import train_qlora
from tests.conftest import disk_for, other_writer
from tests.scripts.test_train_qlora import CPU, gradient, loaded, typed
from tuner.system import signals
from tuner.system.errors import UserError
from tuner.training import adapter_folder, adapter_weights, checkpoints, loss_functions

ROOT = Path(__file__).resolve().parents[2]
LAST = 8  # 20 rows: 2 for validation, 2 steps an epoch, 4 epochs
KILLED_AT = 50


@pytest.fixture(scope="module")
def arguments(tiny_text_model, few_rows):
    given = ["--rehearse", "--model", tiny_text_model, "--data", few_rows, "--epochs", 4]
    return [*given, "--learning-rate", 3e-3]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    code, _, errors = typed(*arguments, folder=folder)
    assert code == 0, errors
    return folder / "qlora_output"


def run_json(folder):
    return json.loads((folder / "run.json").read_text())


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


@contextmanager
def at_step(monkeypatch, number, act):
    """Has act() called in the middle of a step: its gradient is there, the weights are not yet changed."""
    count, real = [train_qlora.add_up], train_qlora.add_up

    def add_up(*args):
        count.append(None)
        if len(count) == number + 1:
            act()
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_qlora, "add_up", add_up)
        yield


def send(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.fixture
def stopped(arguments, monkeypatch, tmp_path):
    """A folder in which a run was stopped in its fifth step, within its third epoch; and what it printed."""
    with at_step(monkeypatch, 5, send(signal.SIGINT)):
        code, out, errors = typed(*arguments, folder=tmp_path)
    assert code == 130
    return tmp_path, out, errors


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def resumed(arguments, folder, *more):
    code, out, errors = typed(*arguments, "--resume", *more, folder=folder)
    return code, out, errors


# -------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_an_epoch_of_which_the_newest_two_and_the_best_are_kept(whole):
    steps = [2, 4, 6, 8]
    kept = {6, 8, run_json(whole)["kept_step"]}
    assert kept <= set(steps)
    assert names(whole / "checkpoints") == [f"step-{step:06}" for step in sorted(kept)]


def test_the_best_one_is_kept_and_written_beside_later_ones(tiny_text_model, tmp_path):
    """With evaluations told beforehand: the second epoch is the best."""
    model = loaded(tiny_text_model)
    weights = dict(train_qlora_weights(model))
    config = model.peft_config["default"]
    for step in (2, 4, 6, 8, 10):
        best = {n: w + 1 for n, w in weights.items()} if step > 4 else None
        history = {"kept_step": min(step, 4), "evaluations": [{}]}
        files = {checkpoints.WEIGHTS: weights, checkpoints.BEST: best, checkpoints.OPTIMIZER: {}}
        checkpoints.write(tmp_path, config, files, {"step": step, "history": history})
    assert names(tmp_path / "checkpoints") == ["step-000004", "step-000008", "step-000010"]
    later = load_file(tmp_path / "checkpoints/step-000010/best.safetensors")
    assert all(torch.equal(later[n], w + 1) for n, w in weights.items())
    assert not (tmp_path / "checkpoints/step-000004/best.safetensors").exists()


def train_qlora_weights(model):
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model)


def test_a_manifest_says_what_is_in_it_and_of_which_run(whole, few_rows):
    place = whole / "checkpoints/step-000008"
    manifest = json.loads((place / "manifest.json").read_text())
    files = set(names(place)) - {"manifest.json"}
    assert set(manifest["sha256"]) == files >= {"adapter_model.safetensors", "optimizer.pt"}
    for name in files:
        assert manifest["sha256"][name] == hashlib.sha256((place / name).read_bytes()).hexdigest()
    assert manifest["step"] == 8
    assert manifest["data_sha256"] == hashlib.sha256(few_rows.read_bytes()).hexdigest()
    assert manifest["settings"]["learning_rate"] == 3e-3
    assert manifest["settings"]["lora_r"] == 16
    assert manifest["history"]["losses"] == run_json(whole)["losses"]


def test_a_checkpoint_is_an_adapter_that_loads(whole, tiny_text_model):
    adapter_weights.check_adapter(whole / "checkpoints/step-000006", tiny_text_model, None)


@pytest.mark.parametrize("name", ["manifest.json", "adapter_model.safetensors", "optimizer.pt"])
@pytest.mark.parametrize("how", ["gone", "torn", "altered", "a link"])
def test_a_damaged_one_is_named_and_passed_over(whole, tmp_path, name, how):
    output = shutil.copytree(whole, tmp_path / "output")
    path = output / "checkpoints/step-000008" / name
    data = path.read_bytes()
    if how == "torn":
        path.write_bytes(data[: len(data) // 2])
    elif how == "altered":
        place = data.index(b'"step": 8') + 8 if name == "manifest.json" else len(data) // 2
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    else:
        path.unlink()
    if how == "a link":
        (tmp_path / "elsewhere").write_bytes(data)
        path.symlink_to(tmp_path / "elsewhere")
    said = []
    manifest, _ = checkpoints.newest(output, said.append)
    assert manifest["step"] == 6
    assert len(said) == 1
    assert re.search(rf"damaged .*step-000008/{name} .*; it is passed over", said[0])


def test_going_on_from_the_one_before_gives_the_same_adapter(arguments, stopped, whole):
    folder, _, _ = stopped
    place = folder / "qlora_output/checkpoints"
    assert names(place) == ["step-000002", "step-000004", "step-000005"] or names(place) == [
        "step-000004",
        "step-000005",
    ]
    (place / "step-000005/optimizer.pt").write_bytes(b"")
    code, out, _ = resumed(arguments, folder)
    assert code == 0
    assert "step-000005/optimizer.pt has changed since it was written; it is passed over" in out
    assert "resumed    after step 4 of 8" in out
    assert weights(folder / "qlora_output") == weights(whole)
    assert "step-000005" not in names(place)


def test_an_optimizer_that_would_run_code_is_not_unpickled(arguments, stopped, tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "pwned").write_text, ("ha",))

    folder, _, _ = stopped
    place = checkpoints.checkpoint_dirs(folder / "qlora_output")[0]
    (place / "optimizer.pt").write_bytes(pickle.dumps({"optimizer": Evil()}, protocol=2))
    manifest = json.loads((place / "manifest.json").read_text())
    manifest["sha256"]["optimizer.pt"] = hashlib.sha256((place / "optimizer.pt").read_bytes()).hexdigest()
    manifest["seal"] = checkpoints.seal(manifest)  # as one would who knows how
    (place / "manifest.json").write_text(json.dumps(manifest))
    code, _, errors = resumed(arguments, folder)
    assert code == 1
    assert "the checkpoint of step 5 does not fit" in errors
    assert not (tmp_path / "pwned").exists()


# ------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_finishes_the_step_keeps_it_and_says_how_to_go_on(
    arguments, whole, monkeypatch, tmp_path, number, code
):
    before = signal.getsignal(number)
    with at_step(monkeypatch, 5, send(number)):
        given, out, errors = typed(*arguments, folder=tmp_path)
    assert given == code
    assert signal.getsignal(number) == before
    assert "Traceback" not in errors
    assert "stopped    the newest checkpoint is qlora_output/checkpoints/step-000005\n" in out
    command = re.search(r"^go on      python train_qlora.py (.*)$", out, re.M)[1]
    assert command.split() == [*map(str, arguments), "--resume"]
    assert names(tmp_path) == ["qlora_output"]
    assert names(tmp_path / "qlora_output") == ["checkpoints"]

    code, out, _ = typed(*command.split(), folder=tmp_path)
    assert code == 0
    assert "resumed    after step 5 of 8" in out
    assert re.findall(r"^epoch +(\d)", out, re.M) == ["3", "4"]
    output = tmp_path / "qlora_output"
    assert weights(output) == weights(whole)
    one, other = run_json(output), run_json(whole)
    assert one["resumed_at"] == [5]
    for key in ("losses", "evaluations", "kept_step", "settings", "tokens", "prompts_sha256"):
        assert one[key] == other[key], key
    assert (output / "loss.png").stat().st_size > 10_000


def test_stopped_three_times_over_it_ends_with_the_same_adapter(arguments, whole, monkeypatch, tmp_path):
    for steps_of_this_run in (1, 3, 2):
        with at_step(monkeypatch, steps_of_this_run, send(signal.SIGTERM)):
            more = ["--resume"] if (tmp_path / "qlora_output").exists() else []
            code, _, _ = typed(*arguments, *more, folder=tmp_path)
        assert code == 143
    code, _, _ = resumed(arguments, tmp_path)
    assert code == 0
    assert run_json(tmp_path / "qlora_output")["resumed_at"] == [1, 4, 6]
    assert weights(tmp_path / "qlora_output") == weights(whole)


def test_an_evaluation_is_broken_off_and_made_up_for(arguments, monkeypatch, tmp_path):
    real = loss_functions.loss_and_predictions

    def ask_while_evaluating(model, batch, *rest):
        if not model.training:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(model, batch, *rest)

    real_evaluate = train_qlora.evaluate
    monkeypatch.setattr(train_qlora, "TOKENS_PER_MICRO_BATCH", 100)  # two micro-batches of validation rows

    def evaluate(*args):
        with monkeypatch.context() as patch:
            patch.setattr(loss_functions, "loss_and_predictions", ask_while_evaluating)
            return real_evaluate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_qlora, "evaluate", evaluate)
        code, out, _ = typed(*arguments, folder=tmp_path)
    assert code == 143
    assert not re.search("^epoch", out, re.M)
    assert names(tmp_path / "qlora_output/checkpoints") == ["step-000002"]
    code, out, _ = resumed(arguments, tmp_path)
    assert code == 0
    assert re.findall(r"^epoch +(\d)", out, re.M) == ["1", "2", "3", "4"]
    assert typed(*arguments, "--output", "other", folder=tmp_path)[0] == 0
    for key in ("losses", "evaluations"):
        assert run_json(tmp_path / "qlora_output")[key] == run_json(tmp_path / "other")[key]


def test_what_it_began_with_must_be_the_same_and_what_differs_is_named(
    arguments, stopped, tiny_text_model, few_rows
):
    folder, _, _ = stopped
    kept = {p: p.read_bytes() for p in (folder / "qlora_output").rglob("*") if p.is_file()}
    rows = folder / "other.json"
    rows.write_text(few_rows.read_text().replace("?", "!", 1))
    from safetensors.torch import save_file

    model = Path(shutil.copytree(tiny_text_model, folder / "other"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] += 0.5
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    for changed, says in [
        (["--data", rows], "the data changed"),
        (["--learning-rate", 1e-3], "learning_rate was 0.003 and is 0.001"),
        (["--epochs", 5, "--bits", 8], "bits was 4 and is 8, epochs was 4 and is 5"),
        (["--model", model], "the model changed"),
    ]:
        code, _, errors = resumed(arguments, folder, *changed)
        assert code == 1
        assert errors.splitlines()[-1] == (
            f"qlora_output cannot be resumed: {says}; give it what it began with, or start afresh with "
            "--overwrite"
        )
    assert {p: p.read_bytes() for p in (folder / "qlora_output").rglob("*") if p.is_file()} == kept


def test_nothing_to_resume_and_a_finished_run_are_said(arguments, whole, tmp_path):
    code, _, errors = resumed(arguments, tmp_path)
    assert code == 1
    assert errors.startswith(
        "qlora_output has nothing to resume; start with: python train_qlora.py --rehearse "
    )
    assert "--resume" not in errors
    assert names(tmp_path) == []
    before = weights(whole)
    code, out, _ = resumed(arguments, whole.parent)
    assert code == 0
    assert out.startswith("finished   the run in qlora_output is done: there is nothing to resume\nnext  ")
    assert weights(whole) == before
    assert "--bits 4" in resumed(arguments, whole.parent, "--bits", "8")[1]  # what it was trained in


def test_an_unfinished_run_is_not_overwritten_unasked(arguments, stopped, whole):
    folder, _, _ = stopped
    code, _, errors = typed(*arguments, folder=folder)
    assert code == 1
    assert errors.startswith(
        "qlora_output holds an unfinished run (step-000005); go on with: python train_qlora.py "
    )
    assert " --resume; or add --overwrite to start afresh" in errors
    code, out, _ = typed(*arguments, "--overwrite", folder=folder)
    assert code == 0
    assert "resumed" not in out
    assert weights(folder / "qlora_output") == weights(whole)
    assert run_json(folder / "qlora_output")["resumed_at"] == []
    assert names(folder) == ["qlora_output"]


def test_resume_and_overwrite_exclude_each_other(tmp_path):
    code, _, errors = typed("--resume", "--overwrite", folder=tmp_path)
    assert code == 2
    assert "not allowed with argument" in errors


# ------------------------------------------------------------------------------------ kill -9, signals


def test_killed_at_fifty_moments_each_goes_on_to_the_same_adapter(arguments, tmp_path):
    halves = []
    for seed in ("one", "two"):  # two at once, with a thread each
        (tmp_path / seed).mkdir()
        halves.append(
            subprocess.Popen(
                [
                    sys.executable,
                    ROOT / "tests/support/killing.py",
                    tmp_path / seed,
                    seed,
                    str(KILLED_AT // 2),
                ]
                + [str(argument) for argument in arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            )
        )
    moments = []
    for half in halves:
        out, errors = half.communicate(timeout=500)
        assert half.returncode == 0, errors
        run, *ends = [json.loads(line) for line in out.splitlines()]
        assert {end["sha256"] for end in ends} == {run["sha256"]}
        moments += ends
    assert len(moments) == KILLED_AT
    assert not any(moment["extra"] for moment in moments)
    assert sum(moment["whole"] > 0 for moment in moments) > 0.4 * KILLED_AT
    left = {name for moment in moments for name in moment["left"]}
    assert any(name.endswith(".part") and name.startswith("step-") for name in left), "none in a checkpoint"
    assert "adapter.part" in left, "none in the final write"


def start(arguments, folder, **streams):
    return subprocess.Popen(
        [sys.executable, ROOT / "train_qlora.py", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        **streams,
    )


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_dropped_connection_costs_nothing(arguments, tmp_path):
    """The terminal of a session goes away, as with ssh: a hang-up, and nobody to read what is printed."""
    arguments = [*arguments, "--epochs", 10_000]
    main, terminal = pty.openpty()
    process = start(
        arguments, tmp_path, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(terminal)
    printed = b""
    while b"epoch  2/" not in printed and b"epoch     2/" not in printed:
        printed += os.read(main, 1000)
    os.close(main)  # the kernel sends SIGHUP
    assert process.wait(timeout=30) == 129
    newest = checkpoints.newest(tmp_path / "qlora_output", pytest.fail)
    assert newest[0]["step"] >= 4
    assert newest[0]["step"] == len(newest[0]["history"]["losses"])


def test_what_is_printed_beside_the_bar_keeps_lines_of_its_own(arguments, tmp_path):
    process = start([*arguments, "--epochs", 1], tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines = re.split(r"[\r\n]+", process.communicate(timeout=120)[0].decode())
    assert process.returncode == 0
    assert any(line.startswith("training: 100%") and line.endswith("]") for line in lines)
    assert any(line.startswith("memory     peak RAM") for line in lines)


def test_ctrl_c_of_a_pipe_whose_reader_it_ends_too(arguments, tmp_path):
    """As in `python train_qlora.py | tee log`: tee dies of the same Ctrl-C, and nothing can be printed."""
    reader, writer = os.pipe()
    process = start([*arguments, "--epochs", 10_000], tmp_path, stdout=writer, stderr=writer)
    os.close(writer)
    printed = b""
    while b"epoch" not in printed:
        printed += os.read(reader, 1000)
    os.close(reader)
    step = checkpoints.checkpoint_dirs(tmp_path / "qlora_output")
    wait_for(lambda: checkpoints.checkpoint_dirs(tmp_path / "qlora_output")[:1] > step)  # it goes on unread
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert checkpoints.newest(tmp_path / "qlora_output", pytest.fail)


def test_a_second_ctrl_c_leaves_at_once(arguments, tmp_path):
    script = tmp_path / "slow.py"
    script.write_text(
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "import train_qlora\n"
        "def slow(*args):\n    print('in a step', flush=True)\n    while True: time.sleep(0.01)\n"
        "train_qlora.add_up = slow\ntrain_qlora.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, script, *map(str, arguments)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while "in a step" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=5) == 130
    errors = process.stderr.read()
    assert "finishing this step and saving a checkpoint; press Ctrl-C again to quit now" in errors
    assert "Traceback" not in errors


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with signals.stop_requests() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not asked
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # of a launcher, at once: no second one
            assert asked.signal == signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, before)


# ----------------------------------------------------------------------------- memory, disk and losses


@contextmanager
def memory_for(monkeypatch, tokens):
    """Has a micro-batch of more tokens run out of memory, as torch says it."""
    real = loss_functions.loss_and_predictions

    def limited(model, batch, *rest):
        if batch[0].numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return real(model, batch, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loss_functions, "loss_and_predictions", limited)
        yield


def test_where_memory_is_full_the_micro_batch_is_halved_and_the_gradient_is_the_same(
    arguments, monkeypatch, tmp_path
):
    monkeypatch.setattr(train_qlora, "LORA_DROPOUT", 0.0)
    code, out, _ = typed(*arguments, "--output", "roomy", folder=tmp_path)
    assert code == 0
    assert "memory     full" not in out
    with memory_for(monkeypatch, 300):
        code, out, _ = typed(*arguments, "--output", "full", folder=tmp_path)
    assert code == 0
    sizes = re.findall(
        r"^memory     full with (\d+) tokens at a time; the same again with (\d+) at most$", out, re.M
    )
    assert len(sizes) >= 2
    assert all(int(after) <= int(before) / 2 for before, after in sizes)
    roomy, full = run_json(tmp_path / "roomy"), run_json(tmp_path / "full")
    assert full["losses"] == pytest.approx(roomy["losses"], rel=1e-5)
    assert full["evaluations"] == [
        {**e, "loss": pytest.approx(e["loss"], rel=1e-5)} for e in roomy["evaluations"]
    ]


def test_the_gradient_of_a_step_done_again_is_not_added_twice(
    tiny_text_model, few_rows, monkeypatch, tokenizer
):
    rows = train_qlora.load_data(few_rows)
    examples = list(train_qlora.tokenise_rows(few_rows, rows, tokenizer))[:8]
    model = loaded(tiny_text_model).eval()
    train_qlora.add_gradients(model, examples, 0, CPU)
    want = gradient(model)
    real, calls = loss_functions.loss_and_predictions, []

    def second_is_too_much(model, batch, *rest):
        calls.append(batch[0].shape)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(model, batch, *rest)

    monkeypatch.setattr(loss_functions, "loss_and_predictions", second_is_too_much)

    def work(tokens):
        model.zero_grad()
        return train_qlora.add_gradients(model, examples, 0, CPU, tokens)

    sizes = partial(train_qlora.padded_sizes, examples, CPU)
    _, tokens = train_qlora.within_memory(work, sizes, CPU, 200)
    assert tokens < 200
    assert torch.allclose(gradient(model), want, rtol=1e-4, atol=1e-8)


def test_at_one_row_it_gives_up_with_the_numbers_and_what_to_change(arguments, monkeypatch, tmp_path):
    with memory_for(monkeypatch, 10):
        code, _, errors = typed(*arguments, folder=tmp_path)
    assert code == 1
    assert re.fullmatch(
        r"the GPU's memory is full with one row of \d+ tokens \(CUDA out of memory. Tried to allocate 20.00 "
        r"MiB.\); train with --bits 4, close what else runs on it \(nvidia-smi\), shorten that row, or take "
        r"a larger GPU; no checkpoint was written yet",
        errors.splitlines()[-1],
    )
    assert names(tmp_path) == []


def test_a_checkpoint_that_cannot_be_written_is_reported_and_training_goes_on(
    arguments, whole, monkeypatch, tmp_path
):
    real = checkpoints.write
    here = {}

    def write(*args):
        if args[-1]["step"] != 4:
            return real(*args)
        with disk_for(200_000):  # the adapter has 135 kB, the optimizer 285
            try:
                return real(*args)
            finally:
                here["then"] = names(tmp_path / "qlora_output/checkpoints")

    monkeypatch.setattr(checkpoints, "write", write)
    code, out, _ = typed(*arguments, folder=tmp_path)
    assert code == 0
    assert out.count("warning    the checkpoint of step 4 could not be written (File too large)") == 1
    assert here["then"] == ["step-000002"]
    assert "step-000008" in names(tmp_path / "qlora_output/checkpoints")
    assert weights(tmp_path / "qlora_output") == weights(whole)


def test_an_adapter_that_cannot_be_written_is_told_with_the_amount_and_resumed(
    arguments, whole, monkeypatch, tmp_path
):
    real = adapter_weights.write_adapter

    def write(*args):
        with disk_for(100_000):
            return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(adapter_weights, "write_adapter", write)
        code, _, errors = typed(*arguments, folder=tmp_path)
    assert code == 1
    assert re.search(
        r"^qlora_output: the adapter could not be written \(File too large\); it takes 1 MB, and \d+ MB are "
        r"free; free some, then go on with: python train_qlora.py .* --resume$",
        errors,
        re.M,
    )
    assert names(tmp_path / "qlora_output") == ["checkpoints"]
    code, out, _ = resumed(arguments, tmp_path)
    assert code == 0
    assert "resumed    after step 8 of 8" in out
    assert weights(tmp_path / "qlora_output") == weights(whole)


def test_a_full_disk_of_its_own(arguments, whole, tmp_path):
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
            code, out, errors = typed(*arguments, "--output", disk / "output", folder=tmp_path)
        assert code == 1
        assert out.count("could not be written (No space left on device); training goes on without it") == 4
        assert (
            "the adapter could not be written (No space left on device); it takes 1 MB, and 0 MB are"
            in errors
        )
        assert not list(disk.rglob("*.part"))
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    ("loss", "problem"),
    [(float("nan"), "is not finite"), (float("inf"), "is not finite"), (40.0, "explodes")],
)
def test_a_loss_that_is_not_finite_or_explodes_stops_and_the_last_checkpoint_stays(
    arguments, monkeypatch, tmp_path, loss, problem
):
    real, count = train_qlora.add_up, []

    def add_up(*args):
        count.append(None)
        return loss if len(count) == 5 else real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_qlora, "add_up", add_up)
        code, _, errors = typed(*arguments, folder=tmp_path)
    assert code == 1
    assert errors.splitlines()[-1] == (
        f"step 5: the loss ({loss:.4g}) {problem}; most likely the learning rate 0.003 is too high: start "
        "afresh with --overwrite --learning-rate 0.0003; the last checkpoint is "
        "qlora_output/checkpoints/step-000004"
    )
    manifest, _ = checkpoints.newest(tmp_path / "qlora_output", pytest.fail)
    assert manifest["step"] == 4
    assert all(
        t.isfinite().all()
        for t in load_file(
            checkpoints.checkpoint_dirs(tmp_path / "qlora_output")[0] / "adapter_model.safetensors"
        ).values()
    )


def test_at_the_first_step_the_model_is_to_blame():
    with pytest.raises(UserError, match=r"^step 1: .* most likely the base model's weights are damaged: "):
        train_qlora.check_loss("loss", float("nan"), 10, 1, 1e-4)


# ------------------------------------------------------------------------------- two runs, strangers


def test_a_second_run_in_a_folder_is_refused_and_a_dead_ones_lock_is_taken_over(arguments, tmp_path):
    with other_writer(tmp_path / "qlora_output") as pid:
        code, out, errors = typed(*arguments, folder=tmp_path)
        assert (code, out) == (1, "")
        assert errors == f"qlora_output is being written by process {pid}; wait until it has finished\n"
        assert names(tmp_path) == ["qlora_output.lock"]
    assert names(tmp_path) == ["qlora_output.lock"]  # it was killed
    code, _, _ = typed(*arguments, folder=tmp_path)
    assert code == 0
    assert names(tmp_path) == ["qlora_output"]


TOKEN = "hf_PLANTEDplantedPLANTEDplanted012345"


def test_a_token_is_in_nothing_that_is_printed_or_written(arguments, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert huggingface_hub.get_token() == TOKEN
    data, model = arguments[4], arguments[2]
    shutil.copyfile(data, tmp_path / "heldout.json")
    for script, given, code in [
        (train_qlora, arguments, 0),
        (train_qlora, ["--rehearse", "--model", "google/no-such-model", "--data", data, "--output", "no"], 1),
        (compare, [], 1),  # the tiny model calls nothing
        (merge, ["--output", "merged"], 0),
        (check, ["--data", data, "--model", model], 0),
    ]:
        given, out, errors = typed(*given, folder=tmp_path, script=script)
        assert given == code, errors
        assert TOKEN not in out + errors
    assert (tmp_path / "merged/README.md").exists()
    assert (tmp_path / "qlora_output/compare.json").exists()
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path
