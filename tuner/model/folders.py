"""Folders that hold a model: what makes one complete, its weights, its version."""

import hashlib
import json
import re
import shutil
from pathlib import Path

from tuner.model.response_template import RESPONSE_TEMPLATE
from tuner.system import output_folder
from tuner.system.errors import UserError

BASE_MODEL = "google/gemma-3-4b-it"
BASE_FOLDER = "gemma-3-4b-it"
SMALL_FOLDER = "gemma-3-270m"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip
# Writes the text that Gemma 3's own template writes; calls and results too. As there, a system message is put
# before the first user turn as it stands, while the turns are trimmed.
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
RENAME = "rename it, or work in another folder"
REVISION_FILE = "REVISION"  # in the folder: which version of the model it holds, and its name on the hub
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
SAMPLES, SAMPLE_BYTES = 256, 4096  # of each weight file's fingerprint; evenly spread over the file


def missing_files(folder):
    """Return the names of the files that `folder` lacks to be a complete model; empty if it is complete.

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
    """Return the paths of a complete model's safetensors files: one, or the shards that its index names."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / shard for shard in sorted(set(shards))]


def weight_bytes(folder):
    """Return how many bytes a complete model's weights take, on disk and in memory as they are."""
    return sum(path.stat().st_size for path in weight_files(folder))


def copy_tokenizer(base, folder):
    """Copy a base's tokenizer into `folder`, with CHAT_TEMPLATE in place of its own, and RESPONSE_TEMPLATE.

    Raise OSError.
    """
    for name in TOKENIZER_FILES:
        if Path(base, name).is_file():
            shutil.copyfile(Path(base, name), folder / name)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    config.pop("chat_template", None)
    config["response_template"] = RESPONSE_TEMPLATE
    path.write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(CHAT_TEMPLATE, folder / "chat_template.jinja")


def revision(folder):
    """Return which version of its model a folder holds: the hub's commit, the GGUF's sha256, or None."""
    return _origin(folder)[0]


def hub_name(folder):
    """Return the name on the hub of the model in a folder, None if the folder does not say it."""
    name = _origin(folder)[1]
    return name if name and HUB_NAME.fullmatch(name) else None


def write_origin(folder, revision, name):
    """Write into a folder which version it holds of the model that has this name on the hub."""
    Path(folder, REVISION_FILE).write_text(f"{revision}\n{name}\n", encoding="utf-8")


def _origin(folder):
    """Return (revision, hub name) of a model folder, each None if it is not known."""
    folder = Path(folder).absolute()
    if folder.parent.name == "snapshots":  # the hub's cache: models--<owner>--<name>/snapshots/<commit>
        return folder.name, folder.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    path = folder / REVISION_FILE
    words = path.read_text(encoding="utf-8", errors="replace").split() if path.is_file() else []
    return (*words, None, None)[:2]


def weights_fingerprint(folder):
    """Return the sha256 of samples of a complete model's weights: tells models apart, reads no gigabytes."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        size = path.stat().st_size
        with open(path, "rb") as file:
            for sample in range(SAMPLES + 1):
                file.seek(sample * max(size - SAMPLE_BYTES, 0) // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
        digest.update(str(size).encode())
    return digest.hexdigest()


def is_complete(folder):
    """Return whether `folder` holds a complete model; raise UserError if it holds something else."""
    missing = missing_files(folder)
    if missing and output_folder.is_vacant(output_folder.resolve(folder, RENAME)):
        return False
    if missing:
        raise UserError(f"{folder} is not a complete model folder ({', '.join(missing)} missing); rename it")
    return True


def check_free_disk(folder, needed):
    """Raise UserError if the disk that `folder` (a path) is on has less than `needed` bytes free."""
    existing = folder.resolve()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{folder} needs {needed / 1e9:.1f} GB of free disk, {free / 1e9:.1f} GB are free; "
            "free some, or work in a folder on a larger disk"
        )
