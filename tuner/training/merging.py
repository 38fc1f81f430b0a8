"""Put an adapter on its base in bf16, and write the two as one model."""

import shutil

import psutil
import torch

from tuner.model import gemma_folder, gemma_tokenizer, loading
from tuner.system import devices
from tuner.system.errors import UserError
from tuner.training import adapter_weights

NOT_FINITE = "base and adapter add up to weights that are not finite in bf16; check the two; nothing was kept"
SHARD_SIZE = "5GB"
GPU_ROOM = 1.2  # of the weights' size: what merging and answering a batch of probes takes beside them
CPU_ROOM = 2.4  # the CPU computes in fp32: twice the bf16 weights, and the same room
DISK_ROOM = 1.05  # of the weights' size, and DISK_BESIDE: tokenizer and configs
DISK_BESIDE = 100e6


def choose_device(weight_bytes, parent, beside=0):
    """Return (device, dtype) to merge in; print what it takes there, and on the disk of the folder `parent`.

    beside: bytes of disk for more than the merged folder. On a CPU the dtype is fp32, which holds the same
    bf16 values exactly. Raise UserError if disk or memory are too small.
    """
    device, needed, free = torch.device("cpu"), CPU_ROOM * weight_bytes, psutil.virtual_memory().available
    if torch.cuda.is_available() and devices.gpu_dtype() == torch.bfloat16:
        free_gpu, _ = torch.cuda.mem_get_info()
        if free_gpu > GPU_ROOM * weight_bytes:
            device, needed, free = torch.device("cuda:0"), GPU_ROOM * weight_bytes, free_gpu
    disk, free_disk = DISK_ROOM * weight_bytes + DISK_BESIDE + beside, shutil.disk_usage(parent).free
    print(
        f"needs      {needed / 1e9:.1f} GB of memory on {devices.device_name(device)} "
        f"({free / 1e9:.1f} free), {disk / 1e9:.1f} GB of disk ({free_disk / 1e9:.1f} free)",
        flush=True,
    )
    if disk > free_disk:
        raise UserError(
            f"not enough disk space in {parent}; free some, or name a folder on a larger disk with --output"
        )
    if needed > free:
        raise UserError("not enough memory; close other programs, or merge on a larger machine")
    return device, torch.float32 if device.type == "cpu" else torch.bfloat16


def load_with_adapter(folder, adapter, device, dtype):
    """Return (model, tokenizer) of the base in `folder`, unquantized, with the adapter on it.

    A base that is not in bf16 is rounded to it first: that base, and no other, is what is merged and proved.
    """
    model = loading.load_base(folder, None, device, dtype)
    if gemma_folder.rounded_from(folder):
        for weight in model.parameters():
            weight.data.copy_(weight.data.to(torch.bfloat16))
    return adapter_weights.add_adapter(model, adapter), gemma_tokenizer.load_tokenizer(folder)


def save_merged(model, folder):
    """Add the adapter to the weights of a PeftModel, and write these in bf16; the model is used up."""
    try:
        merged = model.merge_and_unload(safe_merge=True).to(torch.bfloat16)
    except ValueError as error:  # safe_merge's, for sums that are not finite
        raise UserError(NOT_FINITE) from error
    merged.save_pretrained(folder, max_shard_size=SHARD_SIZE)
