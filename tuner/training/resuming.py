"""Resume a run, or refuse to, with the command that does it."""

import os
import signal
import sys

from tuner.system import commands
from tuner.system.console import print_main
from tuner.system.errors import UserError
from tuner.training import adapter_folder, checkpoints


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
        raise UserError(
            f"{args.output} holds an unfinished run ({dirs[0].name}); resume with: {resume_command()}; "
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


def typed_command(add=""):
    """Return the command that was typed, without --resume and --overwrite, and with `add`."""
    flags = [flag for flag in sys.argv[1:] if flag not in ("--resume", "--overwrite")]
    start = "accelerate launch" if "RANK" in os.environ else "python"
    return commands.join([*start.split(), "train_qlora.py", *flags]) + add


def resume_command():
    return typed_command(" --resume")


def exit_stopped(output, stop_request):
    """Print how to resume, and exit as a process does that a signal ended."""
    dirs = checkpoints.checkpoint_dirs(output)
    print_main(f"stopped    latest checkpoint: {dirs[0]}" if dirs else "stopped    without a checkpoint")
    print_main(f"resume with: {resume_command()}" if dirs else f"start again with: {typed_command()}")
    sys.exit(128 + (stop_request.signal or signal.SIGINT))
