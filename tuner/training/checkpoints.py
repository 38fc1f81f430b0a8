"""A run's checkpoints in output/checkpoints: written whole, and read only if not a byte has changed.

A checkpoint is an adapter too: `python compare.py --adapter qlora_output/checkpoints/step-000020`.
"""

import hashlib
import io
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy, deepcopy
from pathlib import Path

from tuner.system import atomic
from tuner.system.console import printable
from tuner.system.errors import UserError

FOLDER = "checkpoints"
FORMAT = 2  # of what is in it
NEWEST_KEPT = 2  # and the one with the best adapter
MANIFEST = "manifest.json"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BEST = "best.safetensors"  # the best adapter so far, where WEIGHTS is another
OPTIMIZER = "optimizer.pt"  # and the schedule


def checkpoint_dirs(output):
    """Returns the folders of a run's checkpoints, whole or not, the newest first."""
    folder = Path(output, FOLDER)
    found = [path for path in folder.iterdir() if is_checkpoint_dir(path)] if folder.is_dir() else []
    return sorted(found, key=lambda path: path.name, reverse=True)


def is_checkpoint_dir(path):
    return bool(re.fullmatch(r"step-\d{6,}", path.name)) and path.is_dir() and not path.is_symlink()


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def seal(manifest):
    """Returns the sha256 of a manifest without its own seal."""
    rest = {key: value for key, value in manifest.items() if key != "seal"}
    return sha256(json.dumps(rest, sort_keys=True).encode())


# ------------------------------------------------------------------------------------------- writing


@contextmanager
def writer(output, config, facts, say):
    """Gives save(history, weights, best, states), which has a checkpoint written beside training.

    weights and best are {name: tensor} that will not change, best None if it is the weights or not known;
    states are what torch can save and load with weights_only. At the end, however it comes, the last one is
    waited for; it is said if one cannot be written.
    """
    pending = []

    def settle():
        while pending:
            step, writing = pending.pop()
            try:
                writing.result()
            except OSError as error:
                reason = f"could not be written ({error.strerror})"
                say(f"warning    the checkpoint of step {step} {reason}; training goes on without it")

    def save(history, weights, best, states):
        files = {WEIGHTS: weights, BEST: best, OPTIMIZER: copied(states)}
        now = deepcopy({**facts, "step": len(history["losses"]), "history": history})
        settle()
        pending.append((now["step"], pool.submit(write, output, config, files, now)))

    with ThreadPoolExecutor(max_workers=1) as pool:
        try:
            yield save
        finally:
            settle()


def copied(value):
    """Returns dicts and lists as they are, the tensors in them as copies on the CPU."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [copied(item) for item in value]
    return value.detach().to("cpu", copy=True) if hasattr(value, "detach") else value


def write(output, config, files, facts):
    """Writes the checkpoint of facts["step"] and removes those that need not be kept.

    config is a PeftConfig, files are {name: what is to be in it, on the CPU}, None where there is to be no
    such file; facts go into the manifest as they are.
    Raises OSError if it cannot be written; those before it are then as they were.
    """
    place = Path(output, FOLDER, f"step-{facts['step']:06}")
    part = atomic.part_path(place)
    try:
        part.mkdir(parents=True)
        files = {
            name: pickled(what) if name == OPTIMIZER else serialised(what)
            for name, what in files.items()
            if what is not None
        }
        for name, data in files.items():
            (part / name).write_bytes(data)
        write_config(config, part)
        files = {**files, CONFIG: (part / CONFIG).read_bytes()}
        manifest = {**facts, "sha256": {name: sha256(data) for name, data in files.items()}}
        manifest["seal"] = seal(manifest)
        (part / MANIFEST).write_text(json.dumps(manifest, ensure_ascii=False, indent=1), encoding="utf-8")
        atomic.fsync_tree(part)
        if place.exists():  # a damaged one, passed over when the run went on
            remove(place)
        atomic.rename_synced(part, place)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)
        raise
    prune(output, facts["step"], facts["history"]["kept_step"])


def pickled(states):
    """Returns states as the bytes of a file that torch.load reads with weights_only."""
    import torch

    stream = io.BytesIO()
    torch.save(states, stream)
    return stream.getvalue()


def serialised(tensors):
    """Returns {name: tensor} as the bytes of a safetensors file."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(tensors, metadata={"format": "pt"})


def write_config(config, folder):
    """Writes adapter_config.json as PEFT does for an adapter that is to be used."""
    config = copy(config)
    config.inference_mode = True
    config.save_pretrained(folder)


def prune(output, newest, best):
    """Removes all checkpoints but the newest ones and the best; one later than the newest was damaged."""
    found = {int(path.name.removeprefix("step-")): path for path in checkpoint_dirs(output)}
    kept = sorted((step for step in found if step <= newest), reverse=True)[:NEWEST_KEPT]
    for step, path in found.items():
        if step not in (*kept, best):
            remove(path)


def remove(place):
    """Removes a checkpoint; killed meanwhile, it leaves none that looks damaged."""
    gone = place.rename(place.with_name(place.name + ".old"))
    shutil.rmtree(gone, ignore_errors=True)


def clear(output):
    """Removes what killed runs left half written or half removed."""
    for pattern in ("*.part", "*.old"):
        for path in Path(output, FOLDER).glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


# ------------------------------------------------------------------------------------------- reading


def newest(output, say):
    """Returns (manifest, {file: bytes}) of the newest whole checkpoint, or None; says what it passes over."""
    for place in checkpoint_dirs(output):
        try:
            return read(place)
        except UserError as error:
            say(f"damaged    {error}; it is passed over")
    return None


def read(place):
    """Returns (manifest, {file: bytes}) of a checkpoint; raises UserError if it is torn or was altered.

    Only files of the names above are read, and none that is a link.
    """
    data = {}
    for name in (MANIFEST, CONFIG, WEIGHTS, OPTIMIZER, BEST):
        try:
            data[name] = atomic.read_bytes(place / name)
        except FileNotFoundError:
            pass  # told of below, unless it is BEST and not wanted
        except OSError as error:
            raise UserError(f"{place / name} cannot be read ({error.strerror})") from error
    try:
        manifest = json.loads(data.pop(MANIFEST))
        sound = manifest["seal"] == seal(manifest)
        wanted = manifest["sha256"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{place / MANIFEST} is missing or cannot be read") from error
    if not sound:
        raise UserError(f"{place / MANIFEST} has changed since it was written")
    for name in (CONFIG, WEIGHTS, OPTIMIZER, *(name for name in (BEST,) if name in wanted)):
        if name not in data:
            raise UserError(f"{place / name} is missing")
        if sha256(data[name]) != wanted.get(name):
            raise UserError(f"{place / name} has changed since it was written")
    return manifest, {name: data[name] for name in data if name in wanted}


def differences(manifest, facts):
    """Returns what is other than when the checkpoint was written: ["learning_rate was 0.001 and is 0.01"]."""
    found = []
    for key, value in facts.items():
        before = manifest.get(key)
        if key == "settings":
            before = before or {}
            found += [
                f"{name} was {printable(str(before.get(name)), 60)} and is {value.get(name)}"
                for name in {**value, **before}
                if before.get(name) != value.get(name)
            ]
        elif before != value:
            found.append(f"the {key.removesuffix('_sha256')} changed")
    return found


def restore(found, weights, optimizer, schedule):
    """Puts a checkpoint's weights into the tensors of {name: tensor} and sets optimizer and schedule.

    Returns (history, best): best as {name: tensor}, None if no adapter was judged before.
    Raises UserError if the checkpoint does not fit.
    """
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    manifest, data = found
    history = manifest["history"]
    try:
        saved = load(data[WEIGHTS])
        best = load(data[BEST]) if BEST in data else saved if history["evaluations"] else None
        for tensors in (saved, best or saved):
            if {n: t.shape for n, t in tensors.items()} != {n: t.shape for n, t in weights.items()}:
                raise ValueError("its adapter has other tensors")
        states = torch.load(io.BytesIO(data[OPTIMIZER]), map_location="cpu", weights_only=True)
        optimizer.load_state_dict(states["optimizer"])
        schedule.load_state_dict(states["schedule"])
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, KeyError, TypeError) as error:
        place = f"the checkpoint of step {manifest['step']}"
        reason = printable(str(error), 100)
        raise UserError(f"{place} does not fit ({reason}); start afresh with --overwrite") from error
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(saved[name])
    return history, best
