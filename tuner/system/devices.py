"""The CPU or GPU that torch computes on: what it can do, whether its products are right, its memory."""

import os
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from torch.nn.attention import SDPBackend, sdpa_kernel

try:
    import resource
except ImportError:  # Windows
    resource = None

from tuner.system import hardware, libraries
from tuner.system.errors import UserError

MIN_COMPUTE_CAPABILITY = (7, 5)  # Turing: the oldest GPU with the int8 units that 8-bit layers use
# How far bitsandbytes' products may be from torch's, relative to these; rounding gives a tenth of it.
TOLERANCE = {4: 0.02, 8: 0.1}
CPU_DTYPE = torch.float32  # a CPU without AVX512-BF16 multiplies bf16 some 200 times slower than fp32


def start(bits, cpu):
    """Return (accelerate's PartialState, the dtype to compute in) for training in `bits` on GPUs or a CPU.

    Raise UserError if no GPU here can train, or bitsandbytes multiplies wrongly.
    """
    make_cpu_matmul_deterministic()
    dtype = CPU_DTYPE if cpu else gpu_dtype()
    state = PartialState(cpu=cpu)
    check_quantized_matmul(bits, state.device, dtype)
    return state, dtype


def gpu_dtype():
    """Return the dtype to compute in on this GPU. Raise UserError if no CUDA GPU here can train."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch warns of here, an old driver, is reported below
        available = torch.cuda.is_available()
    if not available:
        rehearse = "or rehearse on this CPU: python train_qlora.py --rehearse"
        if hardware.has_driver() and torch.version.cuda is None:
            raise UserError(
                f"torch {torch.__version__} is built for CPUs only, but this machine has an NVIDIA driver; "
                f"install torch's CUDA build (see pytorch.org), {rehearse}"
            )
        if hardware.has_driver():
            raise UserError(
                f"torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use this machine's GPU; see "
                f"nvidia-smi: a driver older than CUDA {torch.version.cuda} needs an older torch, {rehearse}"
            )
        raise UserError(f"no CUDA GPU on this machine; use a machine with one, {rehearse}")
    capability = torch.cuda.get_device_capability()
    if capability < MIN_COMPUTE_CAPABILITY:
        raise UserError(
            f"the {torch.cuda.get_device_name()} is too old (compute capability {dotted(capability)}); use a "
            f"GPU with {dotted(MIN_COMPUTE_CAPABILITY)} or newer: a T4, an RTX 20xx, an L4, an A10 …"
        )
    # Never fp16: Gemma 3 overflows in it. A T4 has no bf16 and computes in fp32.
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


def dotted(capability):
    return ".".join(map(str, capability))


def check_quantized_matmul(bits, device, dtype):
    """Multiply by a matrix quantized to 4 or 8 bits, by torch and by bitsandbytes, and compare.

    Raise UserError if bitsandbytes cannot, or if its product differs: training would learn nonsense.
    """
    cure = (
        "reinstall it: pip install --force-reinstall bitsandbytes=="
        + libraries.library_versions()["bitsandbytes"]
    )
    try:
        libraries.silence_bitsandbytes()
        import bitsandbytes  # here, as an import that fails is reported with its cure

        functional, generator = bitsandbytes.functional, torch.Generator().manual_seed(0)
        weights, values = (torch.randn(256, 256, generator=generator).to(device, dtype) for _ in range(2))
        if bits == 4:
            quantized, state = functional.quantize_4bit(weights, quant_type="nf4", compress_statistics=True)
            weights = functional.dequantize_4bit(quantized, state)
            product = bitsandbytes.matmul_4bit(values, quantized.t(), quant_state=state)
        else:
            layer = bitsandbytes.nn.Linear8bitLt(256, 256, bias=False, has_fp16_weights=False, threshold=6.0)
            layer.weight = bitsandbytes.nn.Int8Params(weights.cpu(), requires_grad=False)
            product = layer.to(device)(values)
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0][:100]
        raise UserError(f"bitsandbytes cannot multiply in {bits} bits here ({reason}); {cure}") from error
    expected = (values @ weights.t()).float()
    error = ((product.float() - expected).norm() / expected.norm()).item()
    if not error < TOLERANCE[bits]:
        raise UserError(f"bitsandbytes multiplies wrongly in {bits} bits here ({error:.0%} off); {cure}")


def check_gpu():
    """Return [(mark, text), …] for this machine's GPU: ✓, or ✗ with the cure."""
    try:
        dtype = gpu_dtype()
    except UserError as error:
        return [("✗", f"GPU: {error}")]
    free, total = torch.cuda.mem_get_info()
    capability = dotted(torch.cuda.get_device_capability())
    bf16 = "bf16" if dtype == torch.bfloat16 else "no bf16, so it computes in fp32"
    name = f"{torch.cuda.get_device_name()}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    lines = [("✓", f"GPU: {name}, compute capability {capability}, {bf16}, CUDA {torch.version.cuda}")]
    for bits in (4, 8):
        try:
            check_quantized_matmul(bits, "cuda:0", dtype)
            lines.append(("✓", f"{bits} bits: bitsandbytes multiplies as torch does"))
        except UserError as error:
            lines.append(("✗", f"{bits} bits: {error}"))
    return lines


@contextmanager
def without_cudnn_attention():
    """Keep torch in the body from cuDNN's attention, which it would choose on an H100.

    cuDNN compiles it for each new shape of its tensors, 1 s and more, and few shapes come again.
    """
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        yield


def make_cpu_matmul_deterministic():
    """Make MKL give the same bits wherever its numbers are in memory; to be called before its first product.

    With AVX-512 one run in four or so differs from the others in its last bits (one in ten with MKL's own
    AVX512,STRICT; none of 18 with this, which takes 8 % longer). No CPU without it was seen to do that, and
    one of another maker may get MKL's slowest path for this setting.
    """
    cpuinfo = Path("/proc/cpuinfo")
    intel = cpuinfo.is_file() and "GenuineIntel" in cpuinfo.read_text()
    if intel and torch.backends.cpu.get_cpu_capability() == "AVX512":
        os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")


def device_name(device):
    """Return the name of a torch.device to print."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def peak_memory(device):
    """Return this process's peak memory in GiB: allocated and reserved on a GPU, resident on a CPU."""
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return {"allocated": allocated / 2**30, "reserved": reserved / 2**30}
    if resource is None:
        return {}
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}


def format_memory(memory):
    """Return what peak_memory measured as text to print."""
    names = {"allocated": "peak GPU memory allocated", "reserved": "reserved", "resident": "peak RAM"}
    return ", ".join(f"{names[kind]} {gib:.2f} GiB" for kind, gib in memory.items())
