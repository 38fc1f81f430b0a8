"""Find the base model: in a folder here, made on the spot, or on the hub."""

from pathlib import Path

from tuner.model import folders, hub, small_model
from tuner.system.errors import UserError


def default_model():
    local = f"./{folders.BASE_FOLDER}"
    return local if Path(local).exists() else folders.BASE_MODEL


def is_local(model):
    """Whether a model is named by its folder, and not by its name on the hub."""
    return Path(model).exists() or model.startswith((".", "/", "~"))


def find_model(model, rehearse):
    """Returns (folder, revision) of a base model: as it lies there, made on the spot, or fetched."""
    small = rehearse and Path(model) == Path(folders.SMALL_FOLDER)
    if small and not Path(model).exists():
        small_model.build_small(model)
    if not is_local(model):
        folder = hub.fetch(model)
        return folder, folders.revision(folder)
    missing = folders.missing_files(model)
    if missing:
        lacks = f"{missing[0]} is missing"
        raise UserError(f"{model} is no complete model ({lacks}); python download_model.py brings one")
    return model, folders.revision(model)
