"""Write an adapter and read it back; check one against its base."""

import json
import shutil
from pathlib import Path

from tuner.system import atomic
from tuner.system.console import printable
from tuner.system.errors import UserError
from tuner.training import adapter_folder, checkpoints, loss_plot
from tuner.training.checkpoints import CONFIG, WEIGHTS


def adapter_bytes(model, base):
    """Returns how many bytes `write` takes, about."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return weights + sum(path.stat().st_size for path in adapter_folder.tokenizer_files(base)) + 1e6


def write_adapter(output, model, base, run):
    """Writes adapter, tokenizer, plot and run.json aside, reads the adapter back, and moves all into place.

    The adapter's config comes last: without it, no folder holds an adapter. `base` is the folder of the base.
    Raises OSError if it cannot be written, UserError if a LoRA weight read back differs from the trained one,
    or an expected lora_B is zero.
    """
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import load

    output = Path(output)
    part = output / adapter_folder.PART
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        trained = get_peft_model_state_dict(model)
        (part / WEIGHTS).write_bytes(checkpoints.serialised(trained))
        checkpoints.write_config(model.peft_config["default"], part)
        for path in adapter_folder.tokenizer_files(base):
            shutil.copyfile(path, part / path.name)
        text = json.dumps(run, ensure_ascii=False, indent=1) + "\n"
        (part / "run.json").write_text(text, encoding="utf-8")
        loss_plot.plot(run, part / "loss.png")
        atomic.fsync_tree(part)

        read_back = load((part / WEIGHTS).read_bytes())
        targets = [name for name, module in model.named_modules() if hasattr(module, "lora_B")]
        if set(read_back) != set(trained) or sum("lora_B" in name for name in read_back) != len(targets):
            raise UserError(f"{part}: the adapter read back lacks weights; free the disk and run again")
        for name, tensor in read_back.items():
            if not tensor.isfinite().all():
                raise UserError(f"{part}: {name} is not finite; train with a lower --learning-rate")
            if not torch.equal(tensor, trained[name].cpu()):
                raise UserError(f"{part}: {name} read back differs from what was trained; check the disk")
            if "lora_B" in name and not tensor.any():
                raise UserError(
                    f"{part}: {name} is all zeros, nothing was learned there; train for more steps"
                )
        for path in sorted(part.iterdir(), key=lambda path: path.name == CONFIG):
            atomic.rename_synced(path, output / path.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_adapter(folder, base, revision):
    """Checks an adapter's tensors against those that its config gives on the model in the folder `base`.

    `revision` is the base's, or None. Raises UserError for one of another base, one that lacks a module
    or has another rank, or one with a weight that is not finite or a lora_B that is all zeros.
    """
    import torch
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    other, damaged = f"{folder} was trained on another base", f"{folder} is damaged"
    _, run = adapter_folder.read_adapter(folder)
    if revision and run.get("revision") and run["revision"] != revision:
        versions = f"{printable(str(run['revision']), 12)}, {base} holds {printable(revision, 12)}"
        raise UserError(f"{other} (revision {versions}); fetch that one, or {adapter_folder.AGAIN}")
    try:
        config = PeftConfig.from_pretrained(folder)
        config.base_model_name_or_path = str(base)  # a hub's name, and PEFT would warn of the cache's path
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
            expected = get_peft_model_state_dict(get_peft_model(model, config))
    except (ValueError, TypeError, KeyError) as error:
        reason = printable(str(error), 100)
        raise UserError(
            f"{folder}/{CONFIG} does not fit {base} ({reason}); {adapter_folder.AGAIN}"
        ) from error
    with safe_open(Path(folder) / WEIGHTS, "pt") as file:
        found = set(file.keys())
        if extra := sorted(found - set(expected)):
            raise UserError(f"{other}: {base} has no place for {extra[0]}; {adapter_folder.AGAIN}")
        for name in sorted(found):
            # lora_A is (rank, width of the input), lora_B (width of the output, rank).
            shape, wanted = file.get_slice(name).get_shape(), list(expected[name].shape)
            rank = 0 if "lora_A" in name else 1
            if shape[1 - rank] != wanted[1 - rank]:
                widths = f"{shape[1 - rank]} wide, in {base} {wanted[1 - rank]}"
                raise UserError(f"{other}: {name} is {widths}; {adapter_folder.AGAIN}")
            if shape != wanted:
                ranks = f"rank {shape[rank]}, {CONFIG} says {wanted[rank]}"
                raise UserError(f"{damaged}: {name} has {ranks}; {adapter_folder.AGAIN}")
        if missing := sorted(set(expected) - found):
            raise UserError(
                f"{damaged}: {missing[0]} and {len(missing) - 1} more are missing; {adapter_folder.AGAIN}"
            )
        for name in sorted(found):
            tensor = file.get_tensor(name)
            if not tensor.isfinite().all():
                raise UserError(f"{damaged}: {name} is not finite; {adapter_folder.AGAIN}")
            if "lora_B" in name and not tensor.any():
                cure = f"take a later checkpoint, or {adapter_folder.AGAIN}"
                raise UserError(f"{folder}: {name} is all zeros, nothing was learned there; {cure}")
