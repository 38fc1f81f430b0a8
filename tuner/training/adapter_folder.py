"""The folder of a run: made ready for one, and read as what a stranger may have made."""

import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from tuner.model import folders
from tuner.system import atomic, output_folder
from tuner.system.console import is_main_process, printable
from tuner.system.errors import UserError
from tuner.training import adapter_config, checkpoints, records, run_command
from tuner.training.adapter_config import TRAIN_AGAIN
from tuner.training.checkpoints import CONFIG, WEIGHTS

RUN = "run.json"  # how it was trained; a merged model has the part of it that tells what it was trained on
# What a base's tokenizer consists of; it goes along, with the chat template that was used.
TOKENIZER = (*folders.TOKENIZER_FILES, "chat_template.jinja", "chat_template.json")
COMPARISON = "compare.json"  # what compare.py leaves beside the adapter, for the merged model's card
# Bytes, on 4B: two checkpoints and one being written, of 300 MB each, adapter (120), tokenizer (33), plot.
DISK_NEEDED = 1.5e9


def check_output(output, resume):
    """Raise UserError if the output folder cannot be written, or holds something that is not a run's.

    Or if the disk is too small; a run that is resumed may have no more than its end to write.
    """
    folder = output_folder.resolve(output)
    is_run = is_finished(folder) or is_unfinished(folder)
    if not is_run and not output_folder.is_vacant(folder):
        raise UserError(f"{output} exists and holds no adapter; {output_folder.CURE}")
    if is_run and (folder / checkpoints.MANIFEST).is_file():
        raise UserError(f"{output} is a checkpoint of another run; {output_folder.CURE}")
    disk = output_folder.check_writable(folder)
    free = shutil.disk_usage(folder if folder.exists() else disk).free
    if free < DISK_NEEDED and not resume:
        raise UserError(
            f"{disk} has {free / 1e9:.2f} GB of free disk, the run may need {DISK_NEEDED / 1e9:.1f}; "
            "free some, or name a folder on another disk with --output"
        )


def is_finished(output):
    return Path(output, CONFIG).is_file()


def is_unfinished(output):
    """Return whether a folder holds what a run leaves that ended before its adapter, among other things."""
    folder = Path(output, checkpoints.FOLDER)
    if output_folder.is_marked(folder) or checkpoints.checkpoint_dirs(output):
        return True
    with suppress(OSError):  # killed before the folder was marked, or when its mark was removed
        return is_alone(folder) and not os.listdir(folder)
    return False


def is_alone(path):
    """Return whether all else in its folder counts for nothing; raise OSError if that cannot be listed."""
    return [other for other in path.parent.iterdir() if not output_folder.is_stray(other)] == [path]


@contextmanager
def opened(output):
    """Hold the output folder for one run: locked, cleared of half-written files; removed if it ends empty.

    In a launcher's other processes, do nothing. Raise UserError if another process holds it.
    """
    if not is_main_process():
        yield
        return
    with atomic.exclusive_lock(output):
        folder = output_folder.resolve(output)
        is_users = folder.exists() and output_folder.is_vacant(folder)
        atomic.clear_workspaces(unfinished(folder))
        checkpoints.clear(folder)
        try:
            yield
        finally:
            remove_if_empty(folder, only_checkpoints=is_users)


def prepare(output):
    """Make the folder ready for a new run: remove the checkpoints, and other files, of an unfinished one.

    A finished adapter is kept as output.1, output.2, …, without its checkpoints. Return that path, or None.
    Nothing else in the folder is touched. Raise UserError if that cannot be done.
    """
    folder, previous = output_folder.resolve(output), None
    try:
        if is_finished(folder):
            previous = move_aside(folder)
        for path in checkpoints.checkpoint_dirs(previous or folder):
            checkpoints.remove(path)
        if (folder / WEIGHTS).exists():  # killed while it gave the adapter's files their names
            for path in run_files(folder):
                path.unlink()
        (folder / checkpoints.FOLDER).mkdir(parents=True, exist_ok=True)
        output_folder.mark(folder / checkpoints.FOLDER)
    except OSError as error:
        raise UserError(f"{output} cannot be prepared ({error.strerror}); {output_folder.CURE}") from error
    if previous is None:
        return None
    remove_if_empty(previous)
    is_link = Path(output).absolute() != folder
    return previous if is_link else f"{output}{str(previous).removeprefix(str(folder))}"


def move_aside(folder):
    """Rename a resolved folder with an adapter, or, if it cannot be renamed, move the adapter within it.

    Return the adapter's new folder.
    """
    if not output_folder.is_fixed(folder):
        return folder.rename(output_folder.free_name(folder))

    def is_begun(path):  # by a run that was killed
        return output_folder.is_marked(path) and not is_finished(path)

    names = output_folder.numbered_names(folder / folder.name)
    previous = next(path for path in names if not os.path.lexists(path) or is_begun(path))
    previous.mkdir(exist_ok=True)
    output_folder.mark(previous)
    for path in [*folder.glob(COMPARISON), *run_files(folder)]:
        path.rename(previous / path.name)
    output_folder.unmark(previous)
    return previous


def run_files(folder):
    """Return the paths of the files of an adapter in a folder: weights first, last the one that ends it."""
    names = [WEIGHTS, RUN, "loss.png", *TOKENIZER, CONFIG]
    return [folder / name for name in names if (folder / name).is_file()]


def unfinished(output):
    """Return the target of the workspace in which the adapter is written."""
    return Path(os.path.realpath(output), "adapter")


def remove_if_empty(output, only_checkpoints=False):
    """Remove the folder of a run that left nothing, or only that of its checkpoints."""
    folder = Path(output, checkpoints.FOLDER)
    with suppress(OSError):
        empty = os.listdir(folder) == [output_folder.MARK] and is_alone(folder)
        if empty or is_finished(output):
            output_folder.unmark(folder)
    for path in (folder, *([] if only_checkpoints else [Path(output)])):
        with suppress(OSError):  # it holds something
            path.rmdir()


def tokenizer_files(base):
    """Return the paths of a base's tokenizer files."""
    return [Path(base, name) for name in TOKENIZER if Path(base, name).is_file()]


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
