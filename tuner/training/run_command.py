"""The command that resumes an unfinished run, by what its newest checkpoint says of it."""

import json
from contextlib import suppress
from pathlib import Path

from tuner.system import commands
from tuner.training import checkpoints

# Flags of train_qlora.py whose values a manifest has, and the types that these must have to be printed.
FLAGS = {"rehearse": bool, "bits": int, "epochs": int, "rows_per_step": int, "learning_rate": float}
FLAGS |= {"seed": int, "data": str, "model": str}
NAMES = {"rows_per_step": "batch_size"}  # of flags that are not those of their values


def begun_with(args):
    """Return what a manifest says of a run beside its settings: the names that were typed."""
    return {"data": args.data, "model": args.model}


def resume_command(output):
    """Return the command that resumes the run in a folder; flags that no checkpoint names are left out."""
    known = began_with(output)
    names = [name for name, kind in FLAGS.items() if type(known.get(name)) is kind]
    flags = {NAMES.get(name, name): known[name] for name in names}
    return commands.command("train_qlora.py", **flags, output=output, resume=True)


def began_with(output):
    """Return the settings and names that the run in a folder began with, {} if no checkpoint has them."""
    for folder in checkpoints.checkpoint_dirs(output):
        with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):  # --resume skips it too
            manifest = json.loads(Path(folder, checkpoints.MANIFEST).read_bytes())
            return {**manifest, **manifest["settings"]}
    return {}
