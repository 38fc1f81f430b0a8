"""Find the base model: in a folder here, built from packages, or on the hub."""

from pathlib import Path

from tuner.model import folders, gemma_folder, hub, small_model
from tuner.system.errors import UserError


def default_model():
    """Return the folder that download_model.py makes, or else the model's name on the hub."""
    local = f"./{folders.BASE_FOLDER}"
    return local if Path(local).exists() else folders.BASE_MODEL


def is_local(model):
    """Return whether `model` names a folder, and not a model on the hub."""
    return Path(model).exists() or model.startswith((".", "/", "~"))


def find_model(model, rehearse, cure="check --model"):
    """Return (folder, revision) of a base model; build the small one or download another if need be.

    Raise UserError that ends in `cure` for a folder that is not there, incomplete, or not Gemma 3's.
    """
    small = rehearse and Path(model) == Path(folders.SMALL_FOLDER)
    if small and not Path(model).exists():
        small_model.build_small(model)
    if not is_local(model):
        folder = hub.fetch(model)
        gemma_folder.check(folder, model, "choose another model")
        return folder, folders.revision(folder)
    if not Path(model).exists():
        raise UserError(f"{model} does not exist; {cure}")
    gemma_folder.check(model, model, cure)
    return model, folders.revision(model)
