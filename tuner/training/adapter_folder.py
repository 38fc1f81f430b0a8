"""The folder of a run: made ready for one, and read as what a stranger may have made."""

import shutil
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from tuner.model import folders
from tuner.system import atomic
from tuner.system.console import is_main_process, printable
from tuner.system.errors import UserError
from tuner.training import adapter_config, checkpoints, records, run_command
from tuner.training.adapter_config import TRAIN_AGAIN
from tuner.training.checkpoints import CONFIG, WEIGHTS

# What a base's tokenizer consists of; it goes along, with the chat template that was used.
TOKENIZER = (*folders.TOKENIZER_FILES, "chat_template*")
PART = "adapter.part"  # where it is written until it is whole
RUN = "run.json"  # how it was trained; a merged model has the part of it that tells what it was trained on
COMPARISON = "compare.json"  # what compare.py leaves beside the adapter, for the merged model's card
# Bytes, on 4B: three checkpoints and one being written, of 300 MB each, adapter (120), tokenizer (33), plot.
DISK_NEEDED = 1.5e9


def check_output(output, resume):
    """Raise UserError if the output folder cannot be written, or holds something that is not a run's.

    Or if the disk is too small; a run that is resumed may have no more than its end to write.
    """
    output = Path(output)
    is_run = is_finished(output) or is_unfinished(output)
    if output.exists() and not is_run and not atomic.is_empty_folder(output):
        raise UserError(f"{output} exists and holds no adapter; name another folder with --output")
    parent = atomic.check_parent_writable(output)
    free = shutil.disk_usage(output if is_run else parent).free
    if free < DISK_NEEDED and not resume:
        raise UserError(
            f"{parent} has {free / 1e9:.2f} GB of free disk, the run may need {DISK_NEEDED / 1e9:.1f}; "
            "free some, or name a folder on another disk with --output"
        )


def is_finished(output):
    return Path(output, CONFIG).is_file()


def is_unfinished(output):
    """Return whether a folder holds what a run leaves that ended before its adapter, and nothing else."""
    folder = Path(output, checkpoints.FOLDER)
    names = (checkpoints.FOLDER, PART, WEIGHTS, "run.json", "loss.png", *TOKENIZER)
    return (
        folder.is_dir()
        and all(any(path.match(name) for name in names) for path in Path(output).iterdir())
        and all(path.match("step-*") for path in folder.iterdir())
    )


@contextmanager
def opened(output):
    """Hold the output folder for one run: locked, cleared of half-written files; removed if it ends empty.

    In a launcher's other processes, do nothing. Raise UserError if another process holds it.
    """
    if not is_main_process():
        yield
        return
    with atomic.exclusive_lock(output):
        clear(output)
        try:
            yield
        finally:
            remove_if_empty(output)


def prepare(output):
    """Empty the folder for a new run: remove what is left of an unfinished one.

    A finished adapter is kept as output.1, output.2, …, without its checkpoints. Return that path, or None.
    Raise UserError if that cannot be done.
    """
    output = Path(output)
    previous = None
    try:
        if is_finished(output):
            number = next(n for n in range(1, 10**6) if not output.with_name(f"{output.name}.{n}").exists())
            previous = output.rename(output.with_name(f"{output.name}.{number}"))
        for folder in checkpoints.checkpoint_dirs(previous or output):
            checkpoints.remove(folder)
        if previous is None and is_unfinished(output):
            for path in output.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        (output / checkpoints.FOLDER).mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"{output} cannot be prepared ({error.strerror}); name another folder with --output"
        ) from error
    if previous:
        remove_if_empty(previous)
    return previous


def clear(output):
    """Remove what killed runs left half written or half removed."""
    checkpoints.clear(output)
    shutil.rmtree(Path(output, PART), ignore_errors=True)


def remove_if_empty(output):
    """Remove the folder of a run that left nothing."""
    for path in (Path(output, checkpoints.FOLDER), Path(output)):
        if atomic.is_empty_folder(path):
            path.rmdir()


def tokenizer_files(base):
    """Return the paths of a base's tokenizer files."""
    return [path for path in Path(base).iterdir() if any(path.match(pattern) for pattern in TOKENIZER)]


def read_adapter(folder):
    """Return (config, run): adapter_config.json as a dict, and run.json's, {} if there is none.

    Of the weights only the file's header is read. Raise UserError if the folder holds no adapter, or a
    damaged one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; train an adapter first: python train_qlora.py")
    if not is_finished(folder):
        if checkpoints.checkpoint_dirs(folder):
            resume = run_command.resume_command(folder)
            raise UserError(f"{folder} holds an unfinished run; resume with: {resume}")
        raise UserError(f"{folder} holds no adapter ({CONFIG} is missing); {TRAIN_AGAIN}")
    config = records.read(folder / CONFIG, {}, TRAIN_AGAIN)
    adapter_config.check(folder, config)
    if not (folder / WEIGHTS).is_file():
        pickle = (folder / "adapter_model.bin").is_file()
        reason = "only a pickle, which is never read: it may run any code" if pickle else f"no {WEIGHTS}"
        raise UserError(f"{folder} holds {reason}; {TRAIN_AGAIN}")
    try:
        with safe_open(folder / WEIGHTS, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder}/{WEIGHTS} is damaged ({printable(str(error))}); {TRAIN_AGAIN}") from error
    return config, records.read(folder / RUN, records.RUN, TRAIN_AGAIN)
