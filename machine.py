"""What this machine is: whether its GPU can train, its name, its memory, the versions of the libraries."""

import os
import shutil
import sys

MIN_COMPUTE_CAPABILITY = (7, 5)  # Turing: the oldest GPU with the int8 units that 8-bit layers use


class RunError(Exception):
    """Something that the user can mend; its text is one line with the cure."""


def gpu_dtype():
    """Returns the type to compute in on this machine's GPU; raises RunError if no CUDA GPU here can train."""
    import warnings

    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch warns of here (an old driver) is said below
        available = torch.cuda.is_available()
    if not available:
        cure = "or rehearse on this CPU: python train_qlora.py --rehearse"
        driver = os.path.exists("/proc/driver/nvidia/version") or shutil.which("nvidia-smi")
        if driver and torch.version.cuda is None:
            raise RunError(
                f"torch {torch.__version__} is built for CPUs only, but this machine has an NVIDIA driver; "
                f"install torch's CUDA build (see pytorch.org), {cure}"
            )
        if driver:
            raise RunError(
                f"torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use this machine's GPU; see "
                f"nvidia-smi: a driver older than CUDA {torch.version.cuda} needs an older torch, {cure}"
            )
        raise RunError(f"no CUDA GPU on this machine; run on one that has one, {cure}")
    if torch.cuda.get_device_capability() < MIN_COMPUTE_CAPABILITY:
        raise RunError(
            f"the {torch.cuda.get_device_name()} is too old (compute capability "
            f"{'.'.join(map(str, torch.cuda.get_device_capability()))}); take a GPU with "
            f"{'.'.join(map(str, MIN_COMPUTE_CAPABILITY))} or newer: a T4, an RTX 20xx, an L4, an A10 …"
        )
    # Never fp16: Gemma 3 overflows in it. A T4 has no bf16 and computes in fp32.
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


def quiet_libraries():
    """Silences by name what libraries say that no user can act on."""
    import logging

    import transformers

    # "inputs will be cast from bfloat16 to float16", at every call: bitsandbytes' 8-bit kernels are made so.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()  # what it reports on loading is checked in load_model
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()


def device_name(device):
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def peak_memory(device):
    """Returns peak memory in GiB: allocated and reserved on a GPU, resident on a CPU."""
    import torch

    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return {"allocated": allocated / 2**30, "reserved": reserved / 2**30}
    if sys.platform == "win32":
        return {}  # Python cannot tell there
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}


def told(memory):
    """Returns what peak_memory found as text."""
    return ", ".join(f"{kind} {gib:.2f} GiB at most" for kind, gib in memory.items())


def versions():
    from importlib.metadata import version

    names = ["torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "huggingface-hub"]
    return {"python": sys.version.split()[0], **{name: version(name) for name in names}}
