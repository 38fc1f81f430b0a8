"""Find out, without a download, whether the base can be had; and find its tokenizer wherever one is."""

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub

from tuner.model import folders, gemma_folder, hub, locate
from tuner.system import libraries
from tuner.system.errors import UserError

TOKENIZER_FOLDER = "gemma-3-tokenizer"  # made from the small model's package where no model is here
ROOT = Path(__file__).resolve().parents[2]


def check_model(model, offline):
    """Return [(mark, text), …] for a folder or a hub name: ✓, ✗ with the cure, or – for unknown.

    offline: do not contact the hub.
    """
    if locate.is_local(model):
        if not Path(model).exists():
            return [("✗", f"model: {model} does not exist; check --model")]
        try:
            gemma_folder.check(model, model, "check --model")
        except UserError as error:
            return [("✗", f"model: {error}")]
        dtypes = gemma_folder.rounded_from(model)
        rounded = f" ({' and '.join(dtypes)}: merge.py merges it as it is rounded to bf16)" if dtypes else ""
        return [("✓", f"model: {model}{rounded}")]
    if offline:
        return [("–", "token and license: not checked (--offline)")]
    token = ("✓", "token: found") if huggingface_hub.get_token() else ("–", "token: none")
    try:
        _, files = hub.ask_hub(model)
    except UserError as error:
        lines = [token] if error.about != "token" else []
        lines.append(("✗", f"{error.about}: {error}"))
        if error.about != "license":
            lines.append(("–", "license: unknown until the above is fixed"))
        return lines
    size = sum(file.size for file in files)
    return [token, ("✓", f"license: accepted, {model} may be downloaded ({size / 1e9:.1f} GB)")]


def is_downloadable(lines):
    """Return whether check_model's lines say that the hub may be asked for files of the model."""
    return any(mark == "✓" and text.startswith("license") for mark, text in lines)


def find_tokenizer(model, online):
    """Return (tokenizer, its source): the model's own, or else the small model's, which is the same.

    online: whether a model that is not here may be asked for at the hub. Raise UserError if there is none.
    """
    with libraries.without_torch():  # tokenizing needs none, and importing it takes longer than all the rest
        from tuner.model import gemma_tokenizer  # imports transformers, which shall see no torch here

        transformers = sys.modules["transformers"]
        transformers.logging.set_verbosity_error()
        if has_tokenizer(model):
            return gemma_tokenizer.load_tokenizer(model), model
        if not locate.is_local(model):
            try:
                return gemma_tokenizer.load_tokenizer(model, local_files_only=not online), model
            except (OSError, ValueError):
                pass  # check_model reports why
        folder = next(filter(has_tokenizer, (folders.SMALL_FOLDER, TOKENIZER_FOLDER)), None)
        if folder is None:
            folder = TOKENIZER_FOLDER
            build_tokenizer(model)
        return gemma_tokenizer.load_tokenizer(folder), f"./{folder}, the same as Gemma-3-4b's"


def has_tokenizer(folder):
    return Path(folder, "tokenizer.json").is_file()


def build_tokenizer(model):
    """Build TOKENIZER_FOLDER from the small model's package. Raise UserError if it is not installed."""
    # In a process of its own: the reader of the package wants torch.
    code = f"from tuner.model import small_model; small_model.build_tokenizer({TOKENIZER_FOLDER!r})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    build = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    if build.returncode:
        reason = build.stderr.strip().split("\n")[-1].removeprefix("tuner.system.errors.UserError: ")
        raise UserError(f"no tokenizer of {model} is here, and {reason}")
