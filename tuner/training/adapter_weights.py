"""An adapter's weights: written and read back, or checked against the base that they are for."""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load, save
from transformers import AutoConfig, AutoModelForCausalLM

from tuner.model import folders, gemma_folder, locate, lora
from tuner.system import atomic
from tuner.system.console import printable
from tuner.system.errors import UserError
from tuner.training import adapter_config, adapter_folder, checkpoints, loss_plot
from tuner.training.adapter_folder import TRAIN_AGAIN
from tuner.training.checkpoints import CONFIG, WEIGHTS

NAME_IT = "name the base's folder, or its name on the hub, with --base"

# ------------------------------------------------------------------------------------------- writing


def write_adapter(output, model, base, run, way_on):
    """Write adapter, tokenizer, loss.png and run.json atomically, after reading the adapter back.

    base: the folder of the base; run: a dict for run.json. The adapter's config comes last: without it, no
    folder holds an adapter. Raise UserError if it cannot be written, with way_on (resuming.way_on), or if a
    LoRA weight read back is not as trained, not finite, or a lora_B of zeros.
    """
    output = Path(output)
    try:
        with atomic.workspace(adapter_folder.unfinished(output)) as work:
            part = work / atomic.NEW
            part.mkdir()
            trained = get_peft_model_state_dict(model)
            (part / WEIGHTS).write_bytes(to_safetensors(trained))
            checkpoints.write_config(model.peft_config["default"], part)
            folders.copy_tokenizer(base, part)
            (part / adapter_folder.RUN).write_text(atomic.to_json(run), encoding="utf-8")
            loss_plot.plot(run, part / "loss.png")
            atomic.fsync_tree(part)
            check_read_back(part, trained, model)
            for path in adapter_folder.run_files(part):
                atomic.rename_synced(path, output / path.name)
    except OSError as error:
        needed, free = adapter_bytes(model, base), shutil.disk_usage(output).free
        raise UserError(
            f"{output}: the adapter could not be written ({error.strerror}); it takes {needed / 1e6:.0f} MB, "
            f"and {free / 1e6:.0f} MB are free; free some, then {way_on}"
        ) from error


def to_safetensors(tensors):
    """Return {name: tensor} as the bytes of a safetensors file."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(tensors, metadata={"format": "pt"})


def check_read_back(folder, trained, model):
    """Raise UserError if the adapter in a folder is not {name: tensor} `trained`, or learned nothing."""
    read_back = load((folder / WEIGHTS).read_bytes())
    targets = [name for name, module in model.named_modules() if hasattr(module, "lora_B")]
    if set(read_back) != set(trained) or sum("lora_B" in name for name in read_back) != len(targets):
        raise UserError(f"{folder}: the adapter read back lacks weights; free some disk space and run again")
    for name, tensor in read_back.items():
        if not tensor.isfinite().all():
            raise UserError(f"{folder}: {name} is not finite; train with a lower --learning-rate")
        if not torch.equal(tensor, trained[name].cpu()):
            raise UserError(f"{folder}: {name} read back differs from what was trained; check the disk")
        if "lora_B" in name and not tensor.any():
            raise UserError(f"{folder}: {name} is all zeros, nothing was learned there; train for more steps")


def adapter_bytes(model, base):
    """Return about how many bytes write_adapter takes."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return weights + sum(path.stat().st_size for path in adapter_folder.tokenizer_files(base)) + 1e6


# ------------------------------------------------------------------------------------------ checking


class Base(NamedTuple):
    folder: str
    revision: str | None  # of the folder, None if it is not known
    name: str  # on the hub, or the folder


def find_base(adapter, base=None):
    """Return the Base of an adapter, downloaded or built if need be, once the adapter fits it.

    base: its folder or hub name, None for the one that the adapter records, wherever it is now.
    Raise UserError if there is none, or the adapter does not fit it.
    """
    config, run = adapter_folder.read_adapter(adapter)
    commit = locate.hub_commit(run)
    name = base or locate.find_recorded(config["base_model_name_or_path"], adapter, commit)
    cure, is_missing = f"the adapter in {adapter} needs it; {NAME_IT}", not os.path.exists(name)
    on_cpu = not torch.cuda.is_available()
    if base is None and is_missing and on_cpu and Path(name).name == folders.SMALL_FOLDER:
        name = folders.SMALL_FOLDER  # which can be built again, here
    elif base is None and is_missing and run and not commit:  # whatever it is called, it was a folder
        raise UserError(f"{name} does not exist; {cure}")
    try:
        folder, revision = locate.find_model(name, rehearse=on_cpu, cure=cure, commit=commit)
    except UserError as error:
        raise error if NAME_IT in str(error) else UserError(f"{error}; or {NAME_IT}") from error
    check_adapter(adapter, folder, revision)
    return Base(folder, revision, name)


def check_adapter(folder, base, revision):
    """Check an adapter's tensors against those that its config gives on the model in the folder `base`.

    revision: the base's, or None. Raise UserError for an adapter of another base, one that lacks a module or
    has another rank, or one with a weight that is not finite or a lora_B that is all zeros.
    """
    _, run = adapter_folder.read_adapter(folder)
    check_same_base(folder, base, revision, run)
    expected = expected_tensors(folder, base)
    with safe_open(Path(folder) / WEIGHTS, "pt") as file:
        check_shapes(folder, base, file, expected)
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            if not tensor.isfinite().all():
                raise UserError(f"{folder} is damaged: {name} is not finite; {TRAIN_AGAIN}")
            if "lora_B" in name and not tensor.any():
                cure = f"use a later checkpoint, or {TRAIN_AGAIN}"
                raise UserError(f"{folder}: {name} is all zeros, nothing was learned there; {cure}")


def check_same_base(folder, base, revision, run):
    """Raise UserError if an adapter's run.json names another version of the base, or other weights."""
    other, trained = f"{folder} was trained on another base", run.get("revision")
    if revision and trained:
        if revision == trained:
            return
        versions = f"revision {printable(str(trained), 12)}, {base} holds {printable(revision, 12)}"
        raise UserError(f"{other} ({versions}); {NAME_IT}, or {TRAIN_AGAIN}")
    weights = run.get("model_sha256")
    if weights and weights != folders.weights_fingerprint(base):
        raise UserError(f"{other} (its weights are not those in {base}); {NAME_IT}, or {TRAIN_AGAIN}")


def read_lora(folder):
    """Return the LoraConfig of an adapter: PEFT gets what adapter_config.check lets through, nothing else."""
    config, _ = adapter_folder.read_adapter(folder)
    return LoraConfig(**adapter_config.lora_settings(config))


def add_adapter(model, folder):
    """Return the base with the adapter of a checked folder on it, to be used, not trained."""
    config = read_lora(folder)
    if not lora.has_vision_layers(model):
        config.exclude_modules = None  # as in lora.add_lora
    return PeftModel.from_pretrained(model, folder, config=config).eval()


def expected_tensors(folder, base):
    """Return {name: tensor without data} that an adapter's config gives on a base; raise UserError."""
    config = read_lora(folder)
    config.base_model_name_or_path = str(base)  # a hub's name, and PEFT would warn of the cache's path
    with torch.device("meta"):
        with gemma_folder.explained(base):
            base_config = AutoConfig.from_pretrained(base, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(base_config, trust_remote_code=False)
        try:
            return get_peft_model_state_dict(lora.add_lora(model, config))
        except (ValueError, TypeError, KeyError) as error:
            reason = printable(str(error), 100)
            raise UserError(f"{folder}/{CONFIG} does not fit {base} ({reason}); {TRAIN_AGAIN}") from error


def check_shapes(folder, base, file, expected):
    """Raise UserError unless an open safetensors file has the names and shapes of {name: tensor} expected."""
    names = set(file.keys())
    other, damaged = f"{folder} was trained on another base", f"{folder} is damaged"
    if unknown := sorted(names - set(expected)):
        raise UserError(f"{other}: {base} has no place for {printable(unknown[0], 200)}; {TRAIN_AGAIN}")
    for name in sorted(names):
        weight = file.get_slice(name)
        shape, dtype, expected_shape = weight.get_shape(), weight.get_dtype(), list(expected[name].shape)
        if dtype not in gemma_folder.DTYPES or len(shape) != 2:
            raise UserError(
                f"{damaged}: {name} is {dtype} {shape}, no matrix in F32, F16 or BF16; {TRAIN_AGAIN}"
            )
        # lora_A is (rank, width of the input), lora_B (width of the output, rank).
        rank = 0 if "lora_A" in name else 1
        if shape[1 - rank] != expected_shape[1 - rank]:
            widths = f"{shape[1 - rank]} wide, in {base} {expected_shape[1 - rank]}"
            raise UserError(f"{other}: {name} is {widths}; {TRAIN_AGAIN}")
        if shape != expected_shape:
            ranks = f"rank {shape[rank]}, {CONFIG} says {expected_shape[rank]}"
            raise UserError(f"{damaged}: {name} has {ranks}; {TRAIN_AGAIN}")
    if missing := sorted(set(expected) - names):
        raise UserError(f"{damaged}: {missing[0]} and {len(missing) - 1} more are missing; {TRAIN_AGAIN}")
