"""What this machine is: whether its GPU can train, its name, its memory, the versions of the libraries."""

import gc
import importlib
import io
import os
import shutil
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

MIN_COMPUTE_CAPABILITY = (7, 5)  # Turing: the oldest GPU with the int8 units that 8-bit layers use


class RunError(Exception):
    """Something that the user can mend; its text is one line with the cure."""


HOST_MEMORY = 10e9  # bytes, measured with Gemma-3-4b: 8.6 of them are its file, mapped and soon let go
REHEARSAL_MEMORY = 5e9  # bytes, measured
# How far bitsandbytes' products may be from plain ones, relative to these; rounding gives a tenth of it.
TOLERANCE = {4: 0.02, 8: 0.1}


def has_driver():
    """Whether this machine has an NVIDIA driver."""
    return os.path.exists("/proc/driver/nvidia/version") or shutil.which("nvidia-smi") is not None


@contextmanager
def without_torch():
    """Has transformers import no torch meanwhile, if nothing has before and no GPU is there to be checked."""
    if "torch" in sys.modules or has_driver():
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


def gpu_dtype():
    """Returns the type to compute in on this machine's GPU; raises RunError if no CUDA GPU here can train."""
    import warnings

    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch warns of here (an old driver) is said below
        available = torch.cuda.is_available()
    if not available:
        cure = "or rehearse on this CPU: python train_qlora.py --rehearse"
        driver = has_driver()
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


def is_out_of_memory(error):
    """Whether torch says that a GPU's memory is full; whoever asks need not have imported torch."""
    return type(error).__name__ == "OutOfMemoryError"


def check_product(bits, device, dtype):
    """Multiplies by a matrix quantised to 4 or 8 bits, once plainly and once through bitsandbytes.

    Raises RunError if bitsandbytes cannot, or its product is another: training would learn nonsense.
    """
    import torch

    cure = "reinstall it: pip install --force-reinstall bitsandbytes==" + versions()["bitsandbytes"]
    try:
        quiet_bitsandbytes()
        import bitsandbytes
        from bitsandbytes import functional

        chance = torch.Generator().manual_seed(0)
        weights, values = (torch.randn(256, 256, generator=chance).to(device, dtype) for _ in range(2))
        if bits == 4:
            quantised, state = functional.quantize_4bit(weights, quant_type="nf4", compress_statistics=True)
            weights = functional.dequantize_4bit(quantised, state)
            product = bitsandbytes.matmul_4bit(values, quantised.t(), quant_state=state)
        else:
            layer = bitsandbytes.nn.Linear8bitLt(256, 256, bias=False, has_fp16_weights=False, threshold=6.0)
            layer.weight = bitsandbytes.nn.Int8Params(weights.cpu(), requires_grad=False)
            product = layer.to(device)(values)
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0][:100]
        raise RunError(f"bitsandbytes cannot multiply in {bits} bits here ({reason}); {cure}") from error
    plain = (values @ weights.t()).float()
    off = ((product.float() - plain).norm() / plain.norm()).item()
    if not off < TOLERANCE[bits]:
        raise RunError(f"bitsandbytes multiplies wrongly in {bits} bits here ({off:.0%} off); {cure}")


def check_gpu():
    """Returns [(mark, text), …] of this machine's GPU: ✓, ✗ with the cure, or – for none."""
    if not has_driver():
        return [("–", "GPU: none on this machine; checking and rehearsing need none")]
    try:
        dtype = gpu_dtype()
    except RunError as error:
        return [("✗", f"GPU: {error}")]
    import torch

    free, total = torch.cuda.mem_get_info()
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    bf16 = "bf16" if dtype == torch.bfloat16 else "no bf16: it computes in fp32"
    name = f"{torch.cuda.get_device_name()}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    lines = [("✓", f"GPU: {name}, compute capability {capability}, {bf16}, CUDA {torch.version.cuda}")]
    for bits in (4, 8):
        try:
            check_product(bits, "cuda:0", dtype)
            lines.append(("✓", f"{bits} bits: bitsandbytes multiplies as plain torch does"))
        except RunError as error:
            lines.append(("✗", f"{bits} bits: {error}"))
    return lines


def check_memory():
    """Returns [(mark, text)] of this machine's memory."""
    import psutil

    free = psutil.virtual_memory().available
    needed, work = (HOST_MEMORY, "training") if has_driver() else (REHEARSAL_MEMORY, "the rehearsal")
    text = f"memory: {free / 1e9:.0f} GB free, {work} takes {needed / 1e9:.0f}"
    return [("✓", text) if free >= needed else ("✗", text + "; close other programs")]


def quiet_bitsandbytes():
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
    quiet_bitsandbytes()
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


@contextmanager
def uncompiled_attention():
    """Has torch do meanwhile without cuDNN's attention, which it would take on an H100.

    That is compiled for each new shape of its tensors, 1 s and more, and few of them come again.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        yield


def make_products_repeatable():
    """Has MKL give the same bits wherever in memory its numbers lie; called before its first product.

    With AVX-512 one run in four or so differs from the others in its last bits (one in ten with MKL's own
    AVX512,STRICT; none of 18 with this, which takes 8 % longer). No CPU without it was seen to do that, and
    one of another maker may get MKL's slowest path for this setting.
    """
    import torch

    about = Path("/proc/cpuinfo")
    intel = about.is_file() and "GenuineIntel" in about.read_text()
    if intel and torch.backends.cpu.get_cpu_capability() == "AVX512":
        os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")


def outlive_the_terminal():
    """Has what is printed after a connection dropped or a pipe closed be lost, instead of ending the run."""

    class Steady(io.TextIOWrapper):
        def write(self, text):
            with suppress(OSError):
                super().write(text)
                super().flush()  # stdout and stderr stay in the order in which they were written
            return len(text)

        def flush(self):
            with suppress(OSError):
                super().flush()

    for name in ("stdout", "stderr"):
        old = getattr(sys, name)
        encoding, errors = old.encoding, old.errors
        setattr(sys, name, Steady(old.detach(), encoding=encoding, errors=errors))


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
