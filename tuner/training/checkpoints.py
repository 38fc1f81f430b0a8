"""A run's checkpoints in output/checkpoints: written whole, and read only if not a byte has changed.

A checkpoint is an adapter too: `python compare.py --adapter qlora_output/checkpoints/step-000020`.
"""

import hashlib
import json
import os
import re
from contextlib import suppress
from copy import copy
from pathlib import Path
from typing import NamedTuple

from tuner.system import atomic, output_folder
from tuner.system.console import print_main, printable
from tuner.system.errors import UserError

FOLDER = "checkpoints"
FORMAT = 2  # of what is in it
NEWEST_KEPT = 2
MANIFEST = "manifest.json"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
OPTIMIZER = "optimizer.pt"  # and the schedule
FILES = (CONFIG, WEIGHTS, OPTIMIZER, MANIFEST)
EARLIER_FILES = ("best.safetensors",)  # of earlier versions, which kept the best epoch; not read


class Checkpoint(NamedTuple):
    manifest: dict  # step, history, what identifies the run, the sha256 of every file
    files: dict  # {name: bytes}

    @property
    def step(self):
        return self.manifest["step"]

    @property
    def history(self):
        return self.manifest["history"]


def checkpoint_dirs(output):
    """Return the folders of a run's checkpoints, whole or not, the newest first."""
    folder = Path(output, FOLDER)
    dirs = [path for path in folder.iterdir() if is_checkpoint_dir(path)] if folder.is_dir() else []
    return sorted(dirs, key=step_of, reverse=True)


def is_checkpoint_dir(path):
    if not re.fullmatch(r"step-\d{6,}", path.name) or path.is_symlink():
        return False
    return any((path / name).is_file() for name in FILES)


def step_of(folder):
    return int(folder.name.removeprefix("step-"))


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def seal(manifest):
    """Return the sha256 of a manifest without its own seal."""
    unsealed = {key: value for key, value in manifest.items() if key != "seal"}
    return sha256(json.dumps(unsealed, sort_keys=True).encode())


# ------------------------------------------------------------------------------------------- writing


def write_checkpoint(output, config, manifest, files):
    """Write the checkpoint of manifest["step"] atomically, and remove those that need not be kept.

    config: a PeftConfig; files: {name: bytes}. Raise OSError if it cannot be written; those before it are
    then as they were.
    """
    folder = Path(output, FOLDER, f"step-{manifest['step']:06}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic.workspace(unfinished(output)) as work:
        part = work / atomic.NEW
        part.mkdir()
        for name, data in files.items():
            (part / name).write_bytes(data)
        write_config(config, part)
        files = {**files, CONFIG: (part / CONFIG).read_bytes()}
        manifest = {**manifest, "sha256": {name: sha256(data) for name, data in files.items()}}
        manifest["seal"] = seal(manifest)
        (part / MANIFEST).write_text(atomic.to_json(manifest), encoding="utf-8")
        atomic.fsync_tree(part)
        if folder.exists():  # a damaged one, skipped when the run was resumed
            remove(folder)
        if os.path.lexists(folder):  # not ours, or with something in it that is not
            folder.rename(output_folder.free_name(folder))
        atomic.rename_synced(part, folder)
    output_folder.unmark(folder.parent)  # a checkpoint shows whose folder it is
    prune(output, manifest["step"])


def write_config(config, folder):
    """Write adapter_config.json as PEFT does for an adapter that is to be used."""
    config = copy(config)
    config.inference_mode = True
    config.save_pretrained(folder)


def prune(output, newest):
    """Remove all checkpoints but the newest ones; one later than the newest was damaged."""
    dirs = checkpoint_dirs(output)
    kept = [step_of(path) for path in dirs if step_of(path) <= newest][:NEWEST_KEPT]
    for path in dirs:
        if step_of(path) not in kept:
            remove(path)


def remove(folder):
    """Remove a checkpoint's files, and its folder if no other file is in it; one without a seal stays."""
    with suppress(OSError):
        if b'"seal"' in atomic.read_bytes(folder / MANIFEST):
            # The manifest last: what is left of a killed removal is removed the next time.
            for name in EARLIER_FILES + FILES:
                (folder / name).unlink(missing_ok=True)
            folder.rmdir()


def unfinished(output):
    """Return the target of the workspaces in which checkpoints are written."""
    return Path(os.path.realpath(Path(output, FOLDER)), "checkpoint")


def clear(output):
    """Remove what killed runs left half written."""
    atomic.clear_workspaces(unfinished(output))


# ------------------------------------------------------------------------------------------- reading


def newest(output):
    """Return the newest whole Checkpoint, or None; print which ones are damaged and skipped."""
    for folder in checkpoint_dirs(output):
        try:
            return read(folder)
        except UserError as error:
            print_main(f"skipping damaged checkpoint: {error}")
    return None


def read(folder):
    """Return the Checkpoint in a folder; raise UserError if it is torn or was altered.

    Only files of the names above are read, and none that is a link.
    """
    files = {}
    for name in FILES:
        try:
            files[name] = atomic.read_bytes(folder / name)
        except FileNotFoundError:
            pass  # reported below
        except OSError as error:
            raise UserError(f"{folder / name} cannot be read ({error.strerror})") from error
    try:
        manifest = json.loads(files.pop(MANIFEST))
        intact = manifest["seal"] == seal(manifest)
        hashes = manifest["sha256"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / MANIFEST} is missing or cannot be read") from error
    if not intact:
        raise UserError(f"{folder / MANIFEST} has changed since it was written")
    for name in (CONFIG, WEIGHTS, OPTIMIZER):
        if name not in files:
            raise UserError(f"{folder / name} is missing")
        if sha256(files[name]) != hashes.get(name):
            raise UserError(f"{folder / name} has changed since it was written")
    return Checkpoint(manifest, files)


def differences(manifest, run_identity):
    """Return what differs from when the checkpoint was written: ["learning_rate was 0.001 and is 0.01"].

    Other bytes of data with the same tokens are no difference: a line end, a key that decides nothing.
    """
    changed = []
    for key, value in run_identity.items():
        before = manifest.get(key)
        if key == "settings":
            before = before or {}
            changed += [
                describe_change(name, before.get(name), value.get(name))
                for name in {**value, **before}
                if before.get(name) != value.get(name)
            ]
        elif before != value and key != "data_sha256":
            is_data = key == "tokens_sha256" and manifest.get("data_sha256") != run_identity["data_sha256"]
            changed.append(f"the {'data' if is_data else key.removesuffix('_sha256')} changed")
    return changed


def describe_change(name, before, now):
    return f"{name} was {printable(str(before), 60)} and is {now}"
