"""Prove that a merged model is its base and its adapter, tensor by tensor, and nothing else."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tuner.model import folders, gemma_folder
from tuner.system.console import printable
from tuner.system.errors import UserError
from tuner.training import adapter_config, adapter_folder

HEAD = "lm_head.weight"
ROUNDING = 2.0**-8  # of a value rounded to bf16 (8 bits of significand), relative


def prove_weights(base, adapter, merged):
    """Compare all tensors of the folder `merged` with base and adapter; return (changed, untouched) counts.

    The base is what its tensors are in bf16. Raise UserError for a tensor that is neither the base's nor the
    sum of both.
    """
    before, after = tensor_files(base), tensor_files(merged)
    drop_tied_head(before, after)
    if set(before) != set(after):
        name = sorted(set(before) ^ set(after))[0]
        raise UserError(
            f"base and merged model differ in which tensors they have ({printable(name)}); nothing was kept"
        )
    deltas = adapter_deltas(adapter, before)
    for name in before:
        old, new = read_tensor(before[name]).to(torch.bfloat16), read_tensor(after[name])
        if new.dtype != torch.bfloat16 or old.shape != new.shape:
            raise UserError(f"{name} is {new.dtype} {tuple(new.shape)} after merging; nothing was kept")
        if not new.isfinite().all():
            raise UserError(f"{name} is not finite in bf16; nothing was kept")
        if name in deltas:
            prove_sum(name, old, deltas[name], new)
        elif not torch.equal(old.view(torch.int16), new.view(torch.int16)):
            raise UserError(f"{name} has no adapter and changed; nothing was kept")
    return len(deltas), len(before) - len(deltas)


def prove_existing(base, adapter, merged):
    """Raise UserError unless the folder `merged`, made some time ago, is base and adapter, nothing else."""
    cure = "add --overwrite to merge again"
    gemma_folder.check(merged, merged, cure)
    try:
        prove_weights(base, adapter, merged)
    except UserError as error:
        reason = str(error).removesuffix("; nothing was kept")
        raise UserError(f"{merged} is not {adapter} merged into its base: {reason}; {cure}") from error


def prove_sum(name, old, lora, new):
    """Raise UserError unless the merged weight W' is W + B·A·scale; lora: (A, B, scale).

    Rounded to bf16 once or, as PEFT does in bf16, twice (B·A first).
    """
    a, b, scale = lora
    delta = (b.float() @ a.float()) * scale
    expected = old.float() + delta
    error = (new.float() - expected).abs()
    # Another device sums B·A's products in another order: of 100 million elements of Gemma 3 270M one, where
    # terms of 1e-3 add up to 5e-9, was off by 1 % of itself on an H100.
    summing = (b.float().abs() @ a.float().abs()) * abs(scale) * len(a) * torch.finfo(torch.float32).eps
    if not (error <= ROUNDING * (expected.abs() + delta.abs()) + summing + 1e-30).all():
        raise UserError(f"{name} did not change by B·A·alpha/r ({error.max():.3g} off); nothing was kept")
    if torch.equal(old, new):
        raise UserError(f"{name} did not change; nothing was kept")


def adapter_deltas(adapter, names):
    """Return {name of the base's tensor: (A, B, what B·A is multiplied by)} of an adapter.

    names: all that the base has, as tensor_files gives them.
    """
    config, _ = adapter_folder.read_adapter(adapter)
    scale = adapter_config.scale(config)
    lora = load_file(Path(adapter, adapter_folder.WEIGHTS))
    deltas = {}
    for a in lora:
        if ".lora_A." in a:
            name = gemma_folder.canonical(a.removeprefix("base_model.model.").replace(".lora_A.", "."))
            if name not in names or name in deltas:
                raise UserError(
                    f"{printable(a)} of the adapter matches no tensor of the base; nothing was kept"
                )
            deltas[name] = lora[a], lora[a.replace(".lora_A.", ".lora_B.")], scale
    return deltas


def tensor_files(folder):
    """Return {canonical name: (path of its file, name in it)} of a model folder's tensors."""
    names = {}
    for path in folders.weight_files(folder):
        with safe_open(path, "pt") as file:
            names.update({gemma_folder.canonical(name): (path, name) for name in file.keys()})  # noqa: SIM118
    return names


def read_tensor(place):
    path, name = place
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def drop_tied_head(before, after):
    """Take out a base's lm_head that is a copy of its embedding: transformers writes one of the two."""
    head, embedding = before.get(HEAD), before.get(gemma_folder.EMBEDDING)
    if head and embedding and HEAD not in after and torch.equal(*map(read_tensor, (head, embedding))):
        del before[HEAD]
