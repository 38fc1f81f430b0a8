"""Import torch and the libraries around it quickly and quietly."""

import gc
import importlib
import logging
import os
import sys
from contextlib import contextmanager
from importlib.metadata import version

from tuner.system import hardware

GEMMA = "transformers.models.gemma3.modeling_gemma3"


@contextmanager
def without_torch():
    """Keep transformers from importing torch in the body, unless it is imported or a GPU will be checked."""
    if "torch" in sys.modules or hardware.has_driver():
        yield
        return
    sys.modules["torch"] = None
    quieted = "TRANSFORMERS_VERBOSITY" not in os.environ
    if quieted:
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # or it warns on import that torch is missing
    try:
        yield
    finally:
        del sys.modules["torch"]
        if quieted:
            del os.environ["TRANSFORMERS_VERBOSITY"]


def silence_bitsandbytes():
    """Silence by name, before bitsandbytes is imported, what no user can act on."""
    # "inputs will be cast from bfloat16 to float16", at every call: its 8-bit kernels work that way. And, on
    # CPUs with AVX512-BF16, that a faster kernel is missing: load_base turns these kernels off.
    for name in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def heavy_imports():
    """Make the imports in the body, torch and what stands on it, quick and quiet; a script enters it once.

    Imports leave no garbage. With the collector off they take a fifth less time; and as it never visits
    these objects later either, the interpreter exits in 0.15 s, not in 1.
    """
    silence_bitsandbytes()
    first = GEMMA not in sys.modules
    if first:
        gc.disable()
    try:
        yield
        # Loading a model would import this file later, with the collector on.
        importlib.import_module(GEMMA)
    finally:
        if first:
            gc.freeze()
            gc.enable()
    transformers = sys.modules["transformers"]
    transformers.logging.set_verbosity_error()  # what it reports on loading is checked in load_base
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()


def library_versions():
    """Return the versions of Python and of the libraries that decide a result, by name."""
    names = ["torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "huggingface-hub"]
    return {"python": sys.version.split()[0], **{name: version(name) for name in names}}
