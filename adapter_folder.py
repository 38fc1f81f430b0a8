"""The folder that training leaves: adapter, tokenizer, run.json, loss.png; written whole, read with doubt."""

import json
import shlex
import shutil
from pathlib import Path

import checkpoints
from checkpoints import CONFIG, WEIGHTS
from tuner.system import atomic
from tuner.system.console import printable
from tuner.system.errors import UserError

# What a base's tokenizer consists of; it goes along as it is.
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*")
PART = "adapter.part"  # where it is written until it is whole
COMPARISON = "compare.json"  # what compare.py leaves beside the adapter, for the merged model's card
# Settings of an adapter that may have PEFT 0.21.2 import a module, or unpickle a file, that they name.
RUN_OR_UNPICKLED = ("megatron_config", "auto_mapping", "corda_config", "lora_ga_config")
AGAIN = "train again: python train_qlora.py"
# Bytes, on 4B: three checkpoints and one being written, of 300 MB each, adapter (120), tokenizer (33), plot.
DISK_NEEDED = 1.5e9


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


def check(output, resume):
    """Raises UserError if the output folder cannot be written, or holds something that is not a run's.

    Or if the disk is too small, but not for one that is resumed: it may have no more than its end to write.
    """
    output = Path(output)
    ours = is_finished(output) or is_unfinished(output)
    if output.exists() and not ours and not atomic.is_empty_folder(output):
        raise UserError(f"{output} is there and holds no adapter; name another folder with --output")
    parent = atomic.check_parent(output)
    free = shutil.disk_usage(output if ours else parent).free
    if free < DISK_NEEDED and not resume:
        raise UserError(
            f"{parent} has {free / 1e9:.2f} GB of free disk, the run may need {DISK_NEEDED / 1e9:.1f}; "
            "free some, or name a folder on another disk with --output"
        )


def is_finished(output):
    return Path(output, CONFIG).is_file()


def is_unfinished(output):
    """Whether a folder holds what a run leaves that ended before its adapter was there, and nothing else."""
    folder = Path(output, checkpoints.FOLDER)
    left = (checkpoints.FOLDER, PART, WEIGHTS, "run.json", "loss.png", *TOKENIZER)
    return (
        folder.is_dir()
        and all(any(path.match(name) for name in left) for path in Path(output).iterdir())
        and all(path.match("step-*") for path in folder.iterdir())
    )


def make_room(output):
    """Makes the folder ready for a new run: what is left of an unfinished one is removed.

    A finished adapter is kept as output.1, output.2, …, without its checkpoints; returns that path, or None.
    Raises UserError if it cannot be.
    """
    output = Path(output)
    earlier = None
    try:
        if is_finished(output):
            number = next(n for n in range(1, 10**6) if not output.with_name(f"{output.name}.{n}").exists())
            earlier = output.rename(output.with_name(f"{output.name}.{number}"))
        for place in checkpoints.places(earlier or output):
            checkpoints.remove(place)
        if earlier is None and is_unfinished(output):
            for path in output.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        (output / checkpoints.FOLDER).mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"{output} cannot be made ready ({error.strerror}); name another with --output"
        ) from error
    if earlier:
        remove_if_empty(earlier)
    return earlier


def clear(output):
    """Removes what killed runs left half written or half removed."""
    checkpoints.clear(output)
    shutil.rmtree(Path(output, PART), ignore_errors=True)


def remove_if_empty(output):
    """Removes the folder of a run that left nothing."""
    for path in (Path(output, checkpoints.FOLDER), Path(output)):
        if atomic.is_empty_folder(path):
            path.rmdir()


def tokenizer_files(base):
    return [path for path in Path(base).iterdir() if any(path.match(pattern) for pattern in TOKENIZER)]


def size(model, base):
    """Returns how many bytes `write` takes, about."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return weights + sum(path.stat().st_size for path in tokenizer_files(base)) + 1e6


def write(output, model, base, run):
    """Writes adapter, tokenizer, plot and run.json aside, reads the adapter back, and moves all into place.

    The adapter's config comes last: without it, no folder holds an adapter. `base` is the folder of the base.
    Raises OSError if it cannot be written, UserError if a LoRA weight read back differs from the trained one,
    or an expected lora_B is zero.
    """
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import load

    output = Path(output)
    part = output / PART
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        trained = get_peft_model_state_dict(model)
        (part / WEIGHTS).write_bytes(checkpoints.serialised(trained))
        checkpoints.write_config(model.peft_config["default"], part)
        for path in tokenizer_files(base):
            shutil.copyfile(path, part / path.name)
        text = json.dumps(run, ensure_ascii=False, indent=1) + "\n"
        (part / "run.json").write_text(text, encoding="utf-8")
        plot(run, part / "loss.png")
        atomic.sync(part)

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
            atomic.rename(path, output / path.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def read_settings(folder):
    """Returns (config, run): adapter_config.json as a dict, and run.json's, {} if there is none.

    No weight is read but the file's header. Raises UserError if the folder holds no adapter, or a damaged.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not there; train an adapter first: python train_qlora.py")
    if not is_finished(folder):
        if checkpoints.places(folder):
            resume = f"python train_qlora.py --output {shlex.quote(str(folder))} --resume"
            raise UserError(f"{folder} holds an unfinished run; go on: {resume}")
        raise UserError(f"{folder} holds no adapter ({CONFIG} is missing); {AGAIN}")
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        method = printable(str(config.get("peft_type")))
        raise UserError(f"{folder} was made by the method {method}, not by LoRA; {AGAIN}")
    for name in RUN_OR_UNPICKLED:
        if config.get(name):
            raise UserError(f"{folder}/{CONFIG} has a {name}, which may run any code; {AGAIN}")
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{folder}/{CONFIG} names no base model; {AGAIN}")
    if not (folder / WEIGHTS).is_file():
        pickle = (folder / "adapter_model.bin").is_file()
        reason = "only a pickle, which is never read: it may run any code" if pickle else f"no {WEIGHTS}"
        raise UserError(f"{folder} holds {reason}; {AGAIN}")
    try:
        with safe_open(folder / WEIGHTS, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder}/{WEIGHTS} is damaged ({printable(str(error))}); {AGAIN}") from error
    return config, read_json(folder / "run.json")


def read_json(path, cure=AGAIN):
    """Returns the object in a JSON file, {} if there is no file; raises UserError if it is damaged."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        reason = printable(str(error))
        raise UserError(f"{path} is damaged ({reason}); {cure}") from error
    return value


def check_weights(folder, base, revision):
    """Checks an adapter's tensors against those that its config gives on the model in the folder `base`.

    `revision` is the base's, or None. Raises UserError for one of another base, one that lacks a module
    or has another rank, or one with a weight that is not finite or a lora_B that is all zeros.
    """
    import torch
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    other, damaged = f"{folder} was trained on another base", f"{folder} is damaged"
    _, run = read_settings(folder)
    if revision and run.get("revision") and run["revision"] != revision:
        versions = f"{printable(str(run['revision']), 12)}, {base} holds {printable(revision, 12)}"
        raise UserError(f"{other} (revision {versions}); fetch that one, or {AGAIN}")
    try:
        config = PeftConfig.from_pretrained(folder)
        config.base_model_name_or_path = str(base)  # a hub's name, and PEFT would warn of the cache's path
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
            expected = get_peft_model_state_dict(get_peft_model(model, config))
    except (ValueError, TypeError, KeyError) as error:
        reason = printable(str(error), 100)
        raise UserError(f"{folder}/{CONFIG} does not fit {base} ({reason}); {AGAIN}") from error
    with safe_open(Path(folder) / WEIGHTS, "pt") as file:
        found = set(file.keys())
        if extra := sorted(found - set(expected)):
            raise UserError(f"{other}: {base} has no place for {extra[0]}; {AGAIN}")
        for name in sorted(found):
            # lora_A is (rank, width of the input), lora_B (width of the output, rank).
            shape, wanted = file.get_slice(name).get_shape(), list(expected[name].shape)
            rank = 0 if "lora_A" in name else 1
            if shape[1 - rank] != wanted[1 - rank]:
                widths = f"{shape[1 - rank]} wide, in {base} {wanted[1 - rank]}"
                raise UserError(f"{other}: {name} is {widths}; {AGAIN}")
            if shape != wanted:
                ranks = f"rank {shape[rank]}, {CONFIG} says {wanted[rank]}"
                raise UserError(f"{damaged}: {name} has {ranks}; {AGAIN}")
        if missing := sorted(set(expected) - found):
            raise UserError(f"{damaged}: {missing[0]} and {len(missing) - 1} more are missing; {AGAIN}")
        for name in sorted(found):
            tensor = file.get_tensor(name)
            if not tensor.isfinite().all():
                raise UserError(f"{damaged}: {name} is not finite; {AGAIN}")
            if "lora_B" in name and not tensor.any():
                cure = f"take a later checkpoint, or {AGAIN}"
                raise UserError(f"{folder}: {name} is all zeros, nothing was learned there; {cure}")
