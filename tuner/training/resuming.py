"""Resume a run, or refuse to, with the command that does it."""

import argparse
import json
import os
import signal
import sys

from tuner.system import commands
from tuner.system.console import print_main
from tuner.system.errors import UserError
from tuner.training import adapter_folder, checkpoints, run_command


def find_checkpoint(args, identity):
    """Return the Checkpoint to resume from, None to start afresh; raise UserError if neither may be done."""
    dirs = checkpoints.checkpoint_dirs(args.output)
    if args.resume:
        if checkpoint := checkpoints.newest(args.output):
            check_unchanged(args.output, checkpoint, identity)
            return checkpoint
        start = typed_command(" --overwrite" if dirs else "")
        raise UserError(f"{args.output} has nothing to resume; start with: {start}")
    if dirs and not adapter_folder.is_finished(args.output) and not args.overwrite:
        typed, began = {**identity["settings"], "data": args.data}, run_command.began_with(args.output)
        is_same = all(began.get(name) == value for name, value in typed.items())
        resume = resume_command() if is_same else run_command.resume_command(args.output)
        raise UserError(
            f"{args.output} holds an unfinished run ({dirs[0].name}); resume with: {resume}; "
            "or add --overwrite to start afresh"
        )
    return None


def check_unchanged(output, checkpoint, identity):
    """Raise UserError that names what differs from when the run of a Checkpoint (or None) began."""
    if checkpoint and (changed := checkpoints.differences(checkpoint.manifest, identity)):
        raise UserError(
            f"{output} cannot be resumed: {', '.join(changed)}; restore what it began with, or start afresh "
            "with --overwrite"
        )


def typed_flags(parser, args):
    """Return the names in the Namespace `args`, as the parser filled it, that were typed, default or not."""
    without_defaults = argparse.Namespace(**dict.fromkeys(vars(args)))
    typed = vars(parser.parse_args(namespace=without_defaults))
    return {name for name, value in typed.items() if value is not None}


def check_finished(args, settings, rows):
    """Raise UserError if a finished run is asked to go on with something else than it had.

    args: with `typed`, the names of the flags that were typed: others do not count, but for the rest of the
    recipe and for rows that changed in the same file.
    """
    _, run = adapter_folder.read_adapter(args.output)
    before = run.get("settings")
    before = before if isinstance(before, dict) else {}
    changed = [
        checkpoints.describe_change(name, before[name], value)
        for name, value in settings.items()
        if before.get(name, value) != value and (name in args.typed or not hasattr(args, name))
    ]
    model = str(before.get("model"))
    if "model" in args.typed and os.path.realpath(model) != os.path.realpath(args.model):
        changed.append(checkpoints.describe_change("model", model, args.model))
    same_rows = rows.sha256 == run.get("data_sha256") or rows_sha256(rows) == run.get("rows_sha256")
    if not same_rows and ("data" in args.typed or args.data == before.get("data")):
        changed.append("the data changed")
    if changed:
        raise UserError(
            f"{args.output} holds a finished run: {', '.join(changed)}; to train with that, and keep the "
            f"adapter that is there, type: {typed_command()}"
        )


def rows_sha256(rows):
    """Return the sha256 of what is learned from rows, whatever form the file has."""
    return checkpoints.sha256(json.dumps([row["messages"] for row in rows]).encode())


def typed_command(add=""):
    """Return the command that was typed, without --resume and --overwrite, and with `add`."""
    flags = [flag for flag in sys.argv[1:] if flag not in ("--resume", "--overwrite")]
    start = "accelerate launch" if "RANK" in os.environ else "python"
    return commands.join([*start.split(), "train_qlora.py", *flags]) + add


def resume_command():
    return typed_command(" --resume")


def way_on(output):
    """Return how to go on with a run that ended: `resume with: …`, or from the start without a checkpoint."""
    if checkpoints.checkpoint_dirs(output):
        return f"resume with: {resume_command()}"
    return f"start again with: {typed_command()}"


def exit_stopped(output, stop_request):
    """Print how to resume, and exit as a process does that a signal ended."""
    dirs = checkpoints.checkpoint_dirs(output)
    print_main(f"stopped    latest checkpoint: {dirs[0]}" if dirs else "stopped    without a checkpoint")
    print_main(way_on(output))
    sys.exit(128 + (stop_request.signal or signal.SIGINT))
