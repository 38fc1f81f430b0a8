"""Prove that a merged model is its base and its adapter, tensor by tensor, and nothing else."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tuner.model import folders
from tuner.system.errors import UserError
from tuner.training import adapter_config, adapter_folder

ROUNDING = 2.0**-8  # of a value rounded to bf16 (8 bits of significand), relative


def prove_weights(base, adapter, merged):
    """Compare all tensors of the folder `merged` with base and adapter; return (changed, untouched) counts.

    Raise UserError for a tensor that is neither the base's nor the sum of both.
    """
    before, after = tensor_files(base), tensor_files(merged)
    if set(before) != set(after):
        name = sorted(set(before) ^ set(after))[0]
        raise UserError(f"base and merged model differ in which tensors they have ({name}); nothing was kept")
    deltas = adapter_deltas(adapter, before)
    for name in before:
        with safe_open(before[name], "pt") as base_file, safe_open(after[name], "pt") as merged_file:
            old, new = base_file.get_tensor(name), merged_file.get_tensor(name)
        if new.dtype != torch.bfloat16 or old.shape != new.shape:
            raise UserError(f"{name} is {new.dtype} {tuple(new.shape)} after merging; nothing was kept")
        if name in deltas:
            prove_sum(name, old, deltas[name], new)
        elif not torch.equal(old.view(torch.int16), new.view(torch.int16)):
            raise UserError(f"{name} has no adapter and changed; nothing was kept")
    return len(deltas), len(before) - len(deltas)


def prove_sum(name, old, lora, new):
    """Raise UserError unless the merged weight W' is W + B·A·alpha/r.

    Rounded to bf16 once or, as PEFT does in bf16, twice (B·A first). lora: (A, B, alpha/r).
    """
    a, b, scale = lora
    delta = (b.float() @ a.float()) * scale
    expected = old.float() + delta
    error = (new.float() - expected).abs()
    if not (error <= ROUNDING * (expected.abs() + delta.abs()) + 1e-30).all():
        raise UserError(f"{name} did not change by B·A·alpha/r ({error.max():.3g} off); nothing was kept")
    if torch.equal(old, new):
        raise UserError(f"{name} did not change; nothing was kept")


def adapter_deltas(adapter, names):
    """Return {name of the base's tensor: (A, B, alpha/r)} of an adapter; names: all that the base has."""
    config, _ = adapter_folder.read_adapter(adapter)
    scale = adapter_config.scale(config)
    lora = load_file(Path(adapter, adapter_folder.WEIGHTS))
    deltas = {}
    for name in lora:
        if ".lora_A." in name:
            module = name[: name.index(".lora_A.")]
            deltas[hub_name(module, names)] = lora[name], lora[name.replace(".lora_A.", ".lora_B.")], scale
    return deltas


def tensor_files(folder):
    """Return {tensor name: path of its file} of a model folder."""
    names = {}
    for path in folders.weight_files(folder):
        with safe_open(path, "pt") as file:
            names.update(dict.fromkeys(file.keys(), path))
    return names


def hub_name(module, names):
    """Return the one of a checkpoint's tensor names that is the weight of a LoRA module.

    The class in memory and the files on the hub name the text model differently; from `layers.` on they
    agree, and the vision tower, which has layers too, has no adapter.
    """
    suffix = "." + module[module.index("layers.") :] + ".weight"
    matches = [name for name in names if name.endswith(suffix) and "vision" not in name]
    if len(matches) != 1:
        raise UserError(
            f"{module} of the adapter matches {len(matches)} tensors of the base; nothing was kept"
        )
    return matches[0]
