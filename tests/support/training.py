"""What tests of training share: a tiny model with LoRA, its gradient, runs and what they leave."""

import dataclasses
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch

import train_qlora
from tests.support.scripts import run_main
from tuner.data import chat_rows, splitting, tokenized
from tuner.model import loading, lora
from tuner.training import accumulation, checkpoints, loss_functions, trainer

ROOT = Path(__file__).resolve().parents[2]
# What accelerate's PartialState is for one process on a CPU.
CPU = SimpleNamespace(
    device=torch.device("cpu"), num_processes=1, process_index=0, destroy_process_group=lambda: None
)


def turn(role, content):
    return {"role": role, "content": content}


def recipe(**changes):
    return dataclasses.replace(train_qlora.RECIPE, **changes)


def without_dropout(monkeypatch):
    """Make runs train without dropout: its masks are those of a process and of a micro-batch."""
    monkeypatch.setattr(train_qlora, "RECIPE", recipe(lora_dropout=0.0))


# ------------------------------------------------------------------------------------ rows and models


def shipped_rows():
    return train_qlora.load_data(ROOT / "examples.json")


def tokenize(path, rows, tokenizer):
    return tokenized.tokenize_rows(
        path, rows, tokenizer, train_qlora.preprocess_function, train_qlora.RECIPE.max_tokens
    )


def shipped_examples(tokenizer):
    """Return the shipped rows as a list of dicts of input_ids, attention_mask and labels."""
    return list(tokenize(ROOT / "examples.json", shipped_rows(), tokenizer))


def trained_prompt(tokenizer, messages):
    """Return the ids that training puts before the tokens of the last answer in a row's messages."""
    rendered = chat_rows.validate_and_render(messages)
    batch = train_qlora.preprocess_function({"messages": [rendered]}, tokenizer)
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    return ids[: max(i for i in range(1, len(ids)) if labels[i] != -100 and labels[i - 1] == -100)]


def load_base(folder, bits=4, dtype=torch.float32, **options):
    return loading.load_base(folder, train_qlora.quantization_config(bits, dtype), "cpu", dtype, **options)


def add_lora(model):
    return lora.add_lora(model, train_qlora.lora_config(train_qlora.RECIPE))


def load_with_lora(folder, bits=4):
    torch.manual_seed(train_qlora.RECIPE.seed)
    return add_lora(load_base(folder, bits))


def awaken(model):
    """Give every lora_B weights that are not zero, so that no gradient is; return the model."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.05)
    return model


def add_gradient(model, examples, tokens=2048):
    """Add the gradient of a step's examples to the model's weights; return the loss."""
    accumulator = accumulation.GradientAccumulator(model, weights=None, pad_id=0, state=CPU)
    return accumulator.add_gradient(examples, tokens)


def take_gradient(model):
    """Return the gradient of all that is trained as one tensor, and clear it."""
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    for parameter in model.parameters():
        parameter.grad = None
    return flat


# ------------------------------------------------------------------------------------------- training


def train(model, data, recipe):
    """Train as train_qlora.tune does, without checkpoints; return the history."""
    run = trainer.Trainer(model, data, recipe, CPU)
    with run.progress.show(False):
        for epoch in range(1, recipe.epochs + 1):
            for batch in splitting.epoch_batches(data.training, epoch, recipe):
                run.step(batch)
            run.end_epoch(epoch)
    return run.progress.finish()


def run_training(*arguments, folder):
    """Run train_qlora.py in this process and in a folder; return (exit code, stdout, stderr)."""
    return run_main(train_qlora.main, *arguments, folder=folder, interrupted="stopped before training began")


def resume(arguments, folder, *more):
    return run_training(*arguments, "--resume", *more, folder=folder)


def start_training(arguments, folder, **options):
    """Start train_qlora.py as a process of its own; return it."""
    return subprocess.Popen(
        [sys.executable, ROOT / "train_qlora.py", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        **options,
    )


@contextmanager
def at_step(monkeypatch, number, act):
    """Call act() in the middle of a run's step: its gradient is there, the weights are not yet changed.

    number: of the step, from 1; a value that act() returns is the step's loss.
    """
    count, real = 0, accumulation.all_reduce_step

    def all_reduce_step(*args):
        nonlocal count
        count += 1
        loss = act() if count == number else None
        return real(*args) if loss is None else loss

    with monkeypatch.context() as patch:
        patch.setattr(accumulation, "all_reduce_step", all_reduce_step)
        yield


def send(number):
    return lambda: os.kill(os.getpid(), number)


@contextmanager
def memory_for(monkeypatch, tokens):
    """Let a micro-batch of more tokens run out of memory, as torch reports it."""
    real = loss_functions.loss_and_predictions

    def limited(model, batch, *rest):
        if batch[0].numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return real(model, batch, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loss_functions, "loss_and_predictions", limited)
        yield


# -------------------------------------------------------------------------------------- what runs leave


def run_json(folder):
    return json.loads((folder / "run.json").read_text())


def adapter_bytes(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def age_checkpoints(output):
    """Make a run's checkpoints those of a version whose evaluations were a loss and the rows right."""
    for folder in checkpoints.checkpoint_dirs(output):
        manifest = json.loads((folder / checkpoints.MANIFEST).read_text())
        for evaluation in manifest["history"]["evaluations"]:
            for key in ("decided", "named", "general"):
                del evaluation[key]
        manifest["seal"] = checkpoints.seal(manifest)
        (folder / checkpoints.MANIFEST).write_text(json.dumps(manifest))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ----------------------------------------------------------------------------------------- GPUs, kills


def fake_cuda(monkeypatch, available=True, capability=(8, 9), bf16=True, cuda="13.0"):
    """Let torch report a GPU that is not there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Test GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch.version, "cuda", cuda)


@contextmanager
def killer(folder, arguments, threads=1):
    """Start killing.py in a folder; give kill(seed, moments), which returns (undisturbed run, kills).

    threads: of each run; tests beside it want the other core.
    """
    alone = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, ROOT / "tests/support/killing.py", folder, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), **alone},
    )

    def answer():
        line = process.stdout.readline()
        assert line, process.stderr.read()
        return json.loads(line)

    def kill(seed, moments):
        process.stdin.write(f"{seed} {moments}\n")
        process.stdin.flush()
        return undisturbed, [answer() for _ in range(moments)]

    try:
        undisturbed = answer()
        yield kill
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
