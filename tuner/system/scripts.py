"""What all scripts do alike: exit codes, errors on stderr, Ctrl-C, a closed pipe, a full GPU."""

import os
import sys

from tuner.system import console
from tuner.system.errors import UserError


def run_script(
    main,
    interrupted="stopped",
    out_of_memory="close what else runs on the GPU (nvidia-smi)",
    error_code=1,
):
    """Run `main` and exit with what it returns, or with `error_code` for what a user can fix.

    What stdout cannot encode, such as a file's name that is no text, is printed as an escape.
    interrupted: what to print after Ctrl-C. out_of_memory: the cure to print where the GPU's memory is full.
    Any other exception keeps its traceback: it is a bug.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main())
    except UserError as error:
        if console.is_main_process():
            print(error, file=sys.stderr)
        sys.exit(error_code)
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `python check.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        print(f"GPU out of memory; {out_of_memory}", file=sys.stderr)
        sys.exit(error_code)


def is_out_of_memory(error):
    """Return whether `error` is torch's for a full GPU, known by its name: torch may not be imported."""
    return type(error).__name__ == "OutOfMemoryError"
