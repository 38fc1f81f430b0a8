"""Find the base model: in a folder here, built from packages, or on the hub."""

import os
import re
from pathlib import Path

from tuner.model import folders, gemma_folder, hub, small_model
from tuner.system import output_folder
from tuner.system.errors import UserError


def default_model():
    """Return the folder that download_model.py makes, or else the model's name on the hub."""
    local = f"./{folders.BASE_FOLDER}"
    return local if Path(local).exists() else folders.BASE_MODEL


def is_local(model):
    """Return whether `model` names a folder, there or not, and no model on the hub."""
    return os.path.exists(model) or not folders.HUB_NAME.fullmatch(model)


def record(model):
    """Return what an adapter records of its base: a name on the hub, or a folder's absolute path."""
    return os.path.abspath(model) if is_local(model) else model


def hub_commit(run):
    """Return the version on the hub of the base that a run.json records, None if it was no hub's."""
    commit = run.get("revision")
    return commit if isinstance(commit, str) and re.fullmatch("[0-9a-f]{40}", commit) else None


def find_recorded(model, adapter, commit=None):
    """Return where the base is that the adapter in a folder records: `model` itself if it is found nowhere.

    A folder that is no longer there may have moved along with the adapter, or be here: looked for is one of
    the same path, or name, in the working directory, beside the adapter and above. A model on the hub may
    have been downloaded there, in the version `commit`.
    """
    if os.path.exists(model):
        return model
    above = Path(adapter).resolve().parents[:3]  # a checkpoint is two folders deeper than its run
    for folder in (Path.cwd(), *above):
        for path in (Path(folder, model), Path(folder, Path(model).name)):
            if not os.path.isdir(path) or folders.missing_files(path):
                continue
            is_copy = commit and (folders.hub_name(path), folders.revision(path)) == (model, commit)
            if is_local(model) or path == Path(folder, model) or is_copy:
                return str(path)
    return model


def find_model(model, rehearse, cure="check --model", commit=None):
    """Return (folder, revision) of a base model; build the small one or download another if need be.

    commit: of the hub's versions, None for the newest. Raise UserError that ends in `cure` for a folder that
    is not there, incomplete, or not Gemma 3's.
    """
    small = rehearse and Path(model) == Path(folders.SMALL_FOLDER)
    if small and output_folder.is_vacant(model):
        small_model.build_small(model)
    if not is_local(model):
        folder = hub.fetch(model, commit)
        gemma_folder.check(folder, model, hub.OTHER_MODEL)
        return folder, folders.revision(folder)
    if not os.path.exists(model):
        raise UserError(f"{model} does not exist; {cure}")
    gemma_folder.check(model, model, cure)
    return model, folders.revision(model)
