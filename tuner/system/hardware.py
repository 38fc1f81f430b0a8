"""What is known of this machine without torch: its driver and its memory."""

import os
import shutil

import psutil

TRAINING_MEMORY = 10e9  # bytes, measured with Gemma-3-4b: 8.6 of them are its file, mapped and soon released
REHEARSAL_MEMORY = 5e9  # bytes, measured


def has_driver():
    """Return whether this machine has an NVIDIA driver."""
    return os.path.exists("/proc/driver/nvidia/version") or shutil.which("nvidia-smi") is not None


def check_host_memory():
    """Return [(mark, text)] for this machine's memory: ✓, or ✗ with the cure."""
    free = psutil.virtual_memory().available
    needed, work = (TRAINING_MEMORY, "training") if has_driver() else (REHEARSAL_MEMORY, "the rehearsal")
    text = f"memory: {free / 1e9:.0f} GB free, {work} needs {needed / 1e9:.0f}"
    return [("✓", text) if free >= needed else ("✗", text + "; close other programs")]
