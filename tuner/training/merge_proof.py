"""Prove that a merged model is its base and its adapter, tensor by tensor, and nothing else."""

from pathlib import Path

from tuner.model import folders
from tuner.system.errors import UserError
from tuner.training import adapter_folder

ROUNDING = 2.0**-8  # of a value rounded to bf16 (8 bits of significand), relative


def tensors(folder):
    """Returns {name: file} of a model folder's tensors."""
    from safetensors import safe_open

    names = {}
    for path in folders.weight_files(folder):
        with safe_open(path, "pt") as file:
            names.update(dict.fromkeys(file.keys(), path))
    return names


def hub_name(module, names):
    """Returns the one of a checkpoint's tensor names that is a LoRA module's weight.

    The class in memory and the files on the hub name the text model differently; from `layers.` on they
    agree, and the vision tower, which has layers too, has no adapter.
    """
    tail = "." + module[module.index("layers.") :] + ".weight"
    found = [name for name in names if name.endswith(tail) and "vision" not in name]
    if len(found) != 1:
        raise UserError(f"{module} of the adapter is {len(found)} tensors of the base; nothing was kept")
    return found[0]


def prove_weights(base, adapter, merged):
    """Compares all tensors of the folder `merged` with base and adapter; returns (changed, untouched) counts.

    A module's merged weight W' must be W + B·A·alpha/r, rounded to bf16 once or, as PEFT does in bf16, twice
    (B·A first). Raises UserError for a tensor that is anything else.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file

    config, _ = adapter_folder.read_adapter(adapter)
    scale = config["lora_alpha"] / config["r"]
    lora = load_file(Path(adapter, adapter_folder.WEIGHTS))
    before, after = tensors(base), tensors(merged)
    if set(before) != set(after):
        name = sorted(set(before) ^ set(after))[0]
        raise UserError(f"base and merged have not the same tensors ({name}); nothing was kept")
    targets = {}
    for name in lora:
        if ".lora_A." in name:
            module = name[: name.index(".lora_A.")]
            targets[hub_name(module, before)] = lora[name], lora[name.replace(".lora_A.", ".lora_B.")]
    for name in before:
        with safe_open(before[name], "pt") as one, safe_open(after[name], "pt") as other:
            old, new = one.get_tensor(name), other.get_tensor(name)
        if new.dtype != torch.bfloat16 or old.shape != new.shape:
            raise UserError(f"{name} is {new.dtype} {tuple(new.shape)} after merging; nothing was kept")
        if name not in targets:
            if not torch.equal(old.view(torch.int16), new.view(torch.int16)):
                raise UserError(f"{name} has no adapter and changed; nothing was kept")
            continue
        a, b = targets[name]
        delta = (b.float() @ a.float()) * scale
        wanted = old.float() + delta
        error = (new.float() - wanted).abs()
        if not (error <= ROUNDING * (wanted.abs() + delta.abs()) + 1e-30).all():
            raise UserError(f"{name} did not change by B·A·alpha/r ({error.max():.3g} off); nothing was kept")
        if torch.equal(old, new):
            raise UserError(f"{name} did not change; nothing was kept")
    return len(targets), len(before) - len(targets)
