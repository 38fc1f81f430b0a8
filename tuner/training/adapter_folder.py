"""The folder that training leaves: adapter, tokenizer, run.json, loss.png; written whole, read with doubt."""

import json
import shlex
import shutil
from pathlib import Path

from tuner.system import atomic
from tuner.system.console import printable
from tuner.system.errors import UserError
from tuner.training import checkpoints
from tuner.training.checkpoints import CONFIG, WEIGHTS

# What a base's tokenizer consists of; it goes along as it is.
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*")
PART = "adapter.part"  # where it is written until it is whole
COMPARISON = "compare.json"  # what compare.py leaves beside the adapter, for the merged model's card
# Settings of an adapter that may have PEFT 0.21.2 import a module, or unpickle a file, that they name.
RUN_OR_UNPICKLED = ("megatron_config", "auto_mapping", "corda_config", "lora_ga_config")
AGAIN = "train again: python train_qlora.py"
# Bytes, on 4B: three checkpoints and one being written, of 300 MB each, adapter (120), tokenizer (33), plot.
DISK_NEEDED = 1.5e9


def check_output(output, resume):
    """Raises UserError if the output folder cannot be written, or holds something that is not a run's.

    Or if the disk is too small, but not for one that is resumed: it may have no more than its end to write.
    """
    output = Path(output)
    ours = is_finished(output) or is_unfinished(output)
    if output.exists() and not ours and not atomic.is_empty_folder(output):
        raise UserError(f"{output} is there and holds no adapter; name another folder with --output")
    parent = atomic.check_parent_writable(output)
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
        for place in checkpoints.checkpoint_dirs(earlier or output):
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


def read_adapter(folder):
    """Returns (config, run): adapter_config.json as a dict, and run.json's, {} if there is none.

    No weight is read but the file's header. Raises UserError if the folder holds no adapter, or a damaged.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not there; train an adapter first: python train_qlora.py")
    if not is_finished(folder):
        if checkpoints.checkpoint_dirs(folder):
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
