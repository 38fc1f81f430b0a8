"""The folder that training leaves: adapter, tokenizer, run.json, loss.png; written whole and read back."""

import json
import os
import shutil
from pathlib import Path

from machine import RunError

DISK_NEEDED = 500e6  # bytes: adapter (120 MB on 4B), tokenizer (33 MB), plot; twice, and some room


def plot(history, path):
    """Draws a run's losses and the validation rows decided right over steps, and marks the kept step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(
        range(1, len(history["losses"]) + 1), history["losses"], color="tab:blue", label="training loss"
    )
    axes.set(xlabel="step", ylabel="loss (nats per trained token)", ylim=(0, None))
    evaluations = history["evaluations"]
    if evaluations:
        steps = [e["step"] for e in evaluations]
        axes.plot(steps, [e["loss"] for e in evaluations], "o-", color="tab:orange", label="validation loss")
        rows = history["rows"]["validation"]
        right = axes.twinx()
        right.plot(steps, [e["right"] for e in evaluations], "s--", color="tab:green", label="decided right")
        right.set(ylabel=f"validation rows decided right, of {rows}", ylim=(0, rows * 1.05))
        right.yaxis.get_major_locator().set_params(integer=True)
    axes.axvline(
        history["kept_step"], color="gray", linestyle=":", label=f"kept: step {history['kept_step']}"
    )
    figure.legend(loc="outside upper center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def check(output):
    """Raises RunError if the output folder cannot be written, or holds something that is not an adapter's."""
    output = Path(output)
    if output.exists() and not (output / "adapter_config.json").is_file() and not is_empty_folder(output):
        raise RunError(f"{output} is there and holds no adapter; name another folder with --output")
    parent = output.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise RunError(f"{parent} cannot be written to; name another folder with --output")
    free = shutil.disk_usage(parent).free
    if free < DISK_NEEDED:
        raise RunError(
            f"{parent} has {free / 1e9:.2f} GB of free disk, the adapter may need {DISK_NEEDED / 1e9:.1f}; "
            "free some, or name a folder on another disk with --output"
        )


def is_empty_folder(path):
    return path.is_dir() and not any(path.iterdir())


def write(output, model, tokenizer, run):
    """Writes adapter, tokenizer, plot and run.json aside, reads the adapter back, and moves all into place.

    An earlier adapter of the same name is kept as output.1, output.2, …; returns its new path, or None.
    Raises RunError if a LoRA weight read back differs from the trained one, or an expected lora_B is zero.
    """
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    output = Path(output)
    aside = output.with_name(output.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside, safe_serialization=True, save_embedding_layers=False)
    (aside / "README.md").unlink(missing_ok=True)  # PEFT's model card is a form that nobody filled in
    tokenizer.save_pretrained(aside)
    (aside / "run.json").write_text(json.dumps(run, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    plot(run, aside / "loss.png")

    read_back = load_file(aside / "adapter_model.safetensors")
    trained = get_peft_model_state_dict(model)
    targets = [name for name, module in model.named_modules() if hasattr(module, "lora_B")]
    if set(read_back) != set(trained) or sum("lora_B" in name for name in read_back) != len(targets):
        raise RunError(f"{aside}: the adapter read back lacks weights; free the disk and run again")
    for name, tensor in read_back.items():
        if not torch.equal(tensor, trained[name].cpu()):
            raise RunError(f"{aside}: {name} read back differs from what was trained; check the disk")
        if "lora_B" in name and not tensor.any():
            raise RunError(f"{aside}: {name} is all zeros, nothing was learned there; train for more steps")

    earlier = None
    if output.exists() and not is_empty_folder(output):
        number = next(n for n in range(1, 10**6) if not output.with_name(f"{output.name}.{n}").exists())
        earlier = output.rename(output.with_name(f"{output.name}.{number}"))
    aside.replace(output)
    return earlier
