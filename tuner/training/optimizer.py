"""The article's optimizer and schedule."""

import bitsandbytes
import torch
from transformers import get_cosine_schedule_with_warmup


def make_optimizer(weights, learning_rate, steps, warmup_steps):
    """Return (optimizer, schedule) of the weights, one tensor: paged 8-bit AdamW, and a cosine with warm-up.

    On a CPU torch's AdamW: bitsandbytes pages its 8-bit optimizer between GPU and host only.
    """
    optimizers = {"cuda": bitsandbytes.optim.PagedAdamW8bit, "cpu": torch.optim.AdamW}
    optimizer = optimizers[weights.device.type]([weights], lr=learning_rate, weight_decay=0.0)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, warmup_steps, steps)
