"""The CPU or GPU that torch computes on: what it can do, and how much memory was used."""

import os
import sys
from contextlib import contextmanager
from pathlib import Path

from tuner.system import hardware, libraries
from tuner.system.errors import UserError

MIN_COMPUTE_CAPABILITY = (7, 5)  # Turing: the oldest GPU with the int8 units that 8-bit layers use
# How far bitsandbytes' products may be from plain ones, relative to these; rounding gives a tenth of it.
TOLERANCE = {4: 0.02, 8: 0.1}


def gpu_dtype():
    """Returns the type to compute in on this GPU; raises UserError if no CUDA GPU here can train."""
    import warnings

    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch warns of here (an old driver) is said below
        available = torch.cuda.is_available()
    if not available:
        cure = "or rehearse on this CPU: python train_qlora.py --rehearse"
        driver = hardware.has_driver()
        if driver and torch.version.cuda is None:
            raise UserError(
                f"torch {torch.__version__} is built for CPUs only, but this machine has an NVIDIA driver; "
                f"install torch's CUDA build (see pytorch.org), {cure}"
            )
        if driver:
            raise UserError(
                f"torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use this machine's GPU; see "
                f"nvidia-smi: a driver older than CUDA {torch.version.cuda} needs an older torch, {cure}"
            )
        raise UserError(f"no CUDA GPU on this machine; run on one that has one, {cure}")
    if torch.cuda.get_device_capability() < MIN_COMPUTE_CAPABILITY:
        raise UserError(
            f"the {torch.cuda.get_device_name()} is too old (compute capability "
            f"{'.'.join(map(str, torch.cuda.get_device_capability()))}); take a GPU with "
            f"{'.'.join(map(str, MIN_COMPUTE_CAPABILITY))} or newer: a T4, an RTX 20xx, an L4, an A10 …"
        )
    # Never fp16: Gemma 3 overflows in it. A T4 has no bf16 and computes in fp32.
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


def check_quantized_matmul(bits, device, dtype):
    """Multiplies by a matrix quantised to 4 or 8 bits, once plainly and once through bitsandbytes.

    Raises UserError if bitsandbytes cannot, or its product is another: training would learn nonsense.
    """
    import torch

    cure = (
        "reinstall it: pip install --force-reinstall bitsandbytes=="
        + libraries.library_versions()["bitsandbytes"]
    )
    try:
        libraries.silence_bitsandbytes()
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
        raise UserError(f"bitsandbytes cannot multiply in {bits} bits here ({reason}); {cure}") from error
    plain = (values @ weights.t()).float()
    off = ((product.float() - plain).norm() / plain.norm()).item()
    if not off < TOLERANCE[bits]:
        raise UserError(f"bitsandbytes multiplies wrongly in {bits} bits here ({off:.0%} off); {cure}")


def check_gpu():
    """Returns [(mark, text), …] of this machine's GPU: ✓, ✗ with the cure, or – for none."""
    if not hardware.has_driver():
        return [("–", "GPU: none on this machine; checking and rehearsing need none")]
    try:
        dtype = gpu_dtype()
    except UserError as error:
        return [("✗", f"GPU: {error}")]
    import torch

    free, total = torch.cuda.mem_get_info()
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    bf16 = "bf16" if dtype == torch.bfloat16 else "no bf16: it computes in fp32"
    name = f"{torch.cuda.get_device_name()}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    lines = [("✓", f"GPU: {name}, compute capability {capability}, {bf16}, CUDA {torch.version.cuda}")]
    for bits in (4, 8):
        try:
            check_quantized_matmul(bits, "cuda:0", dtype)
            lines.append(("✓", f"{bits} bits: bitsandbytes multiplies as plain torch does"))
        except UserError as error:
            lines.append(("✗", f"{bits} bits: {error}"))
    return lines


@contextmanager
def without_cudnn_attention():
    """Has torch do meanwhile without cuDNN's attention, which it would take on an H100.

    That is compiled for each new shape of its tensors, 1 s and more, and few of them come again.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        yield


def make_cpu_matmul_deterministic():
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


def format_memory(memory):
    """Returns what peak_memory found as text."""
    return ", ".join(f"{kind} {gib:.2f} GiB at most" for kind, gib in memory.items())
