"""Import torch and the libraries around it quickly and quietly."""

import gc
import importlib
import os
import sys
from contextlib import contextmanager

from tuner.system import hardware

GEMMA = "transformers.models.gemma3.modeling_gemma3"


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


@contextmanager
def heavy_imports():
    """Import torch and what stands on it in the body, quickly and quietly: to be entered once, by a script.

    Garbage is not collected in the body, where there is none. Without that the imports take a fifth less;
    and as these objects are not looked at later either, the interpreter exits in 0.15 s, not in 1.
    """
    silence_bitsandbytes()
    first = GEMMA not in sys.modules
    if first:
        gc.disable()
    try:
        yield
        # Heavy. Loading a model would import the Gemma 3 file later, with the collector at work.
        importlib.import_module(GEMMA)
        from transformers import logging  # heavy too
    finally:
        if first:
            gc.freeze()
            gc.enable()
    logging.set_verbosity_error()  # what it reports on loading is checked in load_base
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def import_libraries(*more):
    """Import what a model stands on; to be deleted once all scripts use heavy_imports."""
    with heavy_imports():
        for name in ("torch", "bitsandbytes", "peft", *more):
            importlib.import_module(name)


def library_versions():
    from importlib.metadata import version

    names = ["torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "huggingface-hub"]
    return {"python": sys.version.split()[0], **{name: version(name) for name in names}}
