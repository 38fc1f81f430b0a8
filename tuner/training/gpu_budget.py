"""How much of the GPU a run may take, and what it then computes at once."""

import json
from pathlib import Path

import torch

from tuner.data import batching
from tuner.system import devices
from tuner.system.console import print_main
from tuner.system.errors import UserError
from tuner.training import memory_plan
from tuner.training.memory_plan import LOGITS_AT_ONCE, Workload


def measure(examples, batches):
    """Return the Workload of examples; batches: the row numbers of each step of one epoch."""
    lengths = [len(input_ids) for input_ids in examples["input_ids"]]
    steps = [[lengths[i] for i in batch] for batch in batches]
    return Workload(steps, max(lengths), batching.trained_tokens(examples), sum(lengths))


def plan_memory(limit, recipe, folder, workload, state):
    """Return the memory_plan.Plan for a GPU, and keep the process from reserving more.

    limit: GiB that may be reserved, None for MEMORY_FRACTION of what is free; folder: of the base. None on a
    GPU without bf16: fp32 is trained without graphs. Raise UserError if the memory is too small.
    """
    if devices.gpu_dtype() != torch.bfloat16:
        if not limit:
            return None
        raise UserError(
            "--memory needs a GPU with bf16: an L4, an A10, an RTX 30xx or newer; leave it out here"
        )
    free, total = torch.cuda.mem_get_info()
    budget = limit * 2**30 if limit else memory_plan.MEMORY_FRACTION * free
    if budget > free:
        raise UserError(
            f"--memory {limit:g}: {free / 2**30:.1f} GiB are free on this GPU; ask for less, or close what "
            "else runs (nvidia-smi)"
        )
    dims = memory_plan.read_dimensions(json.loads(Path(folder, "config.json").read_text(encoding="utf-8")))
    sizes = min(LOGITS_AT_ONCE, workload.trained), workload.longest
    plans = memory_plan.make_plans(dims, recipe.bits, recipe.lora_r, budget, *sizes)
    if max(plans[0].tokens, plans[0].checkpointed) < workload.longest:
        raise too_little(budget, dims, recipe, workload, bool(limit))
    torch.cuda.set_per_process_memory_fraction(budget / total)
    plan = memory_plan.quickest_plan(plans, workload.steps, recipe.bits, state)
    print_main(f"memory     up to {budget / 2**30:.1f} GiB: {describe(plan, workload.longest)}")
    return plan


def too_little(budget, dims, recipe, workload, limited):
    """Return the UserError for a budget, in bytes, that the longest row does not fit."""
    at_once = min(LOGITS_AT_ONCE, workload.trained)
    least = memory_plan.least_bytes(dims, recipe.bits, recipe.lora_r, workload.longest, at_once)
    needed = f"{recipe.bits} bits and a row of {workload.longest} tokens need {least / 2**30:.1f}"
    cure = "allow more with --memory" if limited else "close what else runs on it (nvidia-smi)"
    cure += f", use {'--bits 4, ' * (recipe.bits == 8)}shorter rows or a larger GPU"
    return UserError(f"{budget / 2**30:.1f} GiB of GPU memory is too little: {needed}; {cure}")


def describe(plan, longest):
    """Return in words what a Plan computes at once."""
    graphs = f"{plan.tokens} tokens at once, as CUDA graphs" if plan.tokens else ""
    if plan.tokens >= longest:
        return graphs
    longer = "; longer rows " if graphs else ""
    return f"{graphs}{longer}{plan.checkpointed} tokens at once, with gradient checkpointing"
