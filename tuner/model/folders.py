"""Folders that hold a model: what makes one complete, its weights, its version."""

import hashlib
import json
import shutil
from pathlib import Path

from tuner.system.errors import UserError

BASE_MODEL = "google/gemma-3-4b-it"
BASE_FOLDER = "gemma-3-4b-it"
REVISION_FILE = "REVISION"  # in the folder: which version of the model it holds

SAMPLES, SAMPLE = 256, 4096  # of each weight file, evenly spread; bytes of one

SMALL_FOLDER = "gemma-3-270m"


def missing_files(folder):
    """What `folder` (a path) lacks to be a complete model: a list of file names, empty if it is complete.

    Complete is: a readable config.json and tokenizer.json, and model.safetensors or an index with every shard
    it names. An index that cannot be read, or that names a file outside the folder, counts as missing.
    """
    folder = Path(folder)
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return missing + ["model.safetensors"] * (not (folder / "model.safetensors").is_file())
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not shards or any(Path(shard).name != shard or shard == ".." for shard in shards):
            raise ValueError("no shards, or one outside the folder")
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return [*missing, index.name]
    return missing + [shard for shard in shards if not (folder / shard).is_file()]


def weight_files(folder):
    """The paths of a complete model's safetensors files: one, or the shards that its index names."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / shard for shard in sorted(set(shards))]


def weight_bytes(folder):
    """How many bytes a complete model's weights take, on disk and in memory as they are."""
    return sum(path.stat().st_size for path in weight_files(folder))


def revision(folder):
    """Which version of its model a folder holds: the hub's commit or the GGUF's sha256; None if unknown."""
    folder = Path(folder)
    if folder.parent.name == "snapshots":  # the hub's cache names its folders so
        return folder.name
    note = folder / REVISION_FILE
    return note.read_text(encoding="utf-8").strip() if note.is_file() else None


def weights_fingerprint(folder):
    """Returns the sha256 of samples of a complete model's weights: tells models apart, reads no gigabytes."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        size = path.stat().st_size
        with open(path, "rb") as file:
            for part in range(SAMPLES + 1):
                file.seek(part * max(size - SAMPLE, 0) // SAMPLES)
                digest.update(file.read(SAMPLE))
        digest.update(str(size).encode())
    return digest.hexdigest()


def is_complete(folder):
    """True if `folder` holds a complete model. Raises UserError if it is there but is none."""
    if not folder.exists():
        return False
    if missing := missing_files(folder):
        raise UserError(f"{folder}: lacks {', '.join(missing)}; rename or remove it and run this again")
    return True


def check_free_disk(folder, needed):
    """Raises UserError if the disk that `folder` (a path) is on has less than `needed` bytes free."""
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{folder}: {needed / 1e9:.1f} GB of free disk are needed and {free / 1e9:.1f} GB are there; "
            "free some, or go to a folder on a larger disk"
        )
