"""How long a run takes on the usual GPUs, and which of them have the memory for it, without a GPU here."""

import json
from pathlib import Path
from types import SimpleNamespace

from tuner.training import memory_plan

CARDS = (8, 12, 16, 24, 48)  # GiB
# Training's seconds, measured with an H100 (torch 2.11), 40 steps of 16 short rows, by number of bits. A
# micro-batch is some ten thousand small kernels, whatever its size, and 4 operations per weight and token: 2
# forward, and 2 in the backward pass, which needs no gradient of the base's weights.
START = {4: 21, 8: 29}  # imports and loading, between what two hosts took
EPOCH = 0.6  # an evaluation and a checkpoint
BUSY = {4: 0.17, 8: 0.15}  # the share of the published figure that a card reaches in these operations
# Published dense bf16 tera-operations per second, and GiB; the T4 computes in fp32, having no bf16.
PUBLISHED = {"H100": (989, 80), "A100": (312, 40), "RTX 4090": (165, 24), "L4": (121, 24)}
PUBLISHED |= {"A10": (125, 24), "RTX 3090": (71, 24), "T4": (8.1, 16)}
MEASURED_ON, WITHOUT_BF16 = "H100", "T4"
ALONE = SimpleNamespace(process_index=0, num_processes=1)  # one GPU


def run_seconds(dims, workload, bits, card, recipe):
    """Return how long a run takes on a card of PUBLISHED, from start to adapter: measured, or scaled from it.

    dims: the base's memory_plan.Dimensions; recipe: lora_r and epochs.
    """
    tera_operations, gib = PUBLISHED[card]
    if card == WITHOUT_BF16:
        plans = [memory_plan.Plan(0, memory_plan.MICRO_BATCH_TOKENS)]
    else:
        budget = memory_plan.MEMORY_FRACTION * memory_plan.usable_bytes(gib)
        sizes = logits_at_once(workload), workload.longest
        plans = memory_plan.make_plans(dims, bits, recipe.lora_r, budget, *sizes)
    launching = min(memory_plan.plan_seconds(plan, workload.steps, bits, ALONE) for plan in plans)
    operations = 4 * memory_plan.text_weights(dims) * sum(map(sum, workload.steps))
    arithmetic = operations / (tera_operations * 1e12 * BUSY[bits])
    return START[bits] + recipe.epochs * (launching + arithmetic + EPOCH)


def least_memory(dims, workload, bits, recipe):
    """Return the bytes of GPU memory that a run reserves at least."""
    sizes = workload.longest, logits_at_once(workload)
    return memory_plan.least_bytes(dims, bits, recipe.lora_r, *sizes)


def cards_with(size):
    """Return which CARDS (GiB) have `size` bytes of memory for training."""
    return [card for card in CARDS if size <= memory_plan.MEMORY_FRACTION * memory_plan.usable_bytes(card)]


def dimensions_of(model):
    """Return the memory_plan.Dimensions of a model folder, Gemma-3-4b's if it is not here."""
    try:
        return memory_plan.read_dimensions(json.loads(Path(model, "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return memory_plan.GEMMA_3_4B


def logits_at_once(workload):
    return min(memory_plan.LOGITS_AT_ONCE, workload.trained)
