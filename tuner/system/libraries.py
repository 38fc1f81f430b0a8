"""Import torch and the libraries around it quickly and quietly."""

import gc
import importlib
import os
import sys
from contextlib import contextmanager

from tuner.system import hardware


@contextmanager
def without_torch():
    """Has transformers import no torch meanwhile, if nothing has before and no GPU is there to be checked."""
    if "torch" in sys.modules or hardware.has_driver():
        yield
        return
    sys.modules["torch"] = None
    quieted = "TRANSFORMERS_VERBOSITY" not in os.environ
    if quieted:
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # or it says on import that it found none
    try:
        yield
    finally:
        del sys.modules["torch"]
        if quieted:
            del os.environ["TRANSFORMERS_VERBOSITY"]


def silence_bitsandbytes():
    """Silences by name, before bitsandbytes is imported, what no user of it here can act on."""
    import logging

    # "inputs will be cast from bfloat16 to float16", at every call: its 8-bit kernels are made so. And, on
    # CPUs with AVX512-BF16, that a faster kernel is not there: load_model turns these kernels off.
    for name in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).setLevel(logging.ERROR)


def import_libraries(*more):
    """Imports what a model stands on, and silences by name what it says that no user can act on.

    Python looks for garbage meanwhile and finds none. Without that the imports take a fifth less; and as it
    does not look among them later, the interpreter exits in 0.15 s, not in 1.
    """
    silence_bitsandbytes()
    wanted = ("torch", "bitsandbytes", "peft", "transformers.models.gemma3.modeling_gemma3", *more)
    if wanted := [name for name in wanted if name not in sys.modules]:
        gc.disable()
        try:
            for name in wanted:
                importlib.import_module(name)
        finally:
            gc.freeze()
            gc.enable()

    import transformers

    transformers.logging.set_verbosity_error()  # what it reports on loading is checked in load_model
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()


def library_versions():
    from importlib.metadata import version

    names = ["torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "huggingface-hub"]
    return {"python": sys.version.split()[0], **{name: version(name) for name in names}}
