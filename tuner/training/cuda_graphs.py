"""A micro-batch's forward and backward pass as one CUDA graph."""

import math
from collections import Counter
from functools import partial
from types import SimpleNamespace

from tuner.data import batching
from tuner.training import collate, loss_functions, memory_plan
from tuner.training.memory_plan import MULTIPLE

LENGTH_BUCKETS = 16  # the lengths of packed sequences are multiples of a sixteenth of the longest one
CAPTURE_COST_TOKENS = (
    10_000  # tokens, computed in the time that a capture takes: what a further length has to save
)
MIN_REPLAYS = 1  # a run of so many micro-batches, or fewer, is worth no capture
PATTERN = 6  # layers: in Gemma 3 every sixth attends to all tokens, the others to those in a window


def align(tokens):
    """Returns the least multiple of MULTIPLE that is no less."""
    return MULTIPLE * math.ceil(tokens / MULTIPLE)


def choose_length_buckets(sizes):
    """Returns the lengths, ascending, that packs of these sizes are padded to: few, as each is captured."""
    longest = align(max(sizes))
    step = align(longest / LENGTH_BUCKETS)
    wanted = Counter(min(longest, step * math.ceil(size / step)) for size in sizes)
    chosen = [max(wanted)]

    def padding(lengths):
        return sum((min(n for n in lengths if n >= size) - size) * times for size, times in wanted.items())

    while rest := sorted(set(wanted) - set(chosen)):
        best = min(rest, key=lambda length: padding([*chosen, length]))
        if padding(chosen) - padding([*chosen, best]) < CAPTURE_COST_TOKENS:
            break
        chosen.append(best)
    return sorted(chosen)


def capture(work, pool=None):
    """Returns the CUDA graph of work(), and what work() returned; raises OutOfMemoryError."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool):
            result = work()
    except RuntimeError as error:  # ending a capture that ran out of memory fails by another one
        cause = error.__context__ if isinstance(error.__context__, torch.OutOfMemoryError) else error
        if "out of memory" in str(cause):  # what CUDA has for a graph itself is not torch's
            raise torch.OutOfMemoryError(str(cause)) from error
        raise
    return graph, result


def check_free_memory(size, device):
    """Raises torch.OutOfMemoryError if the GPU has not so many bytes left.

    A capture must not be what finds out: torch never frees the memory of one that failed (PyTorch #190308).
    """
    import torch

    torch.cuda.empty_cache()
    torch.empty(int(size), dtype=torch.uint8, device=device)
    torch.cuda.empty_cache()


def make_runner(model, packs, pad_id, device, logits_at_once, plan):
    """Returns run(pack, total): adds the gradient of a pack's summed loss / total, and returns that loss.

    packs: [(tokens, trained tokens), …] of all that the run is going to give; plan: a memory_estimate.Plan,
    which tells what they take. The weights have gradients that stay in their place.
    """
    import torch

    sizes = [tokens for tokens, _ in packs]
    lengths = choose_length_buckets(sizes)
    slots = align(max(trained for _, trained in packs))
    decoder, cross_entropy = (
        model.get_base_model().get_decoder(),
        loss_functions.make_cross_entropy(logits_at_once),
    )
    graphs, pool = {}, torch.cuda.graph_pool_handle()

    def compute(batch, scale):
        loss = loss_functions.packed_loss(model, batch, cross_entropy) * scale
        loss.backward()
        return loss.detach()

    def warm_up(batch):
        """Has loaded what is loaded at its first use, which a capture must not do; adds gradients of 0."""
        layers, random = decoder.layers, torch.cuda.get_rng_state(device)
        decoder.layers = layers[:PATTERN]
        try:
            compute(batch, torch.zeros((), device=device))
        finally:
            decoder.layers = layers
            torch.cuda.set_rng_state(random, device)

    def run(pack, total):
        length = next(length for length in lengths if length >= batching.total_tokens(pack))
        batch = {
            k: v.to(device, non_blocking=True)
            for k, v in collate.collate_packed(pack, length, slots, pad_id).items()
        }
        scale = torch.tensor(1 / total, device=device)
        if len(sizes) <= MIN_REPLAYS:
            return compute(batch, scale)
        if not graphs:
            warm_up(batch)
        if length not in graphs:  # they share their memory
            more = plan.kept * max(0, length - max(graphs, default=0))
            check_free_memory(more if graphs else more + plan.logits * min(slots, logits_at_once), device)
            graph, loss = capture(partial(compute, batch, scale), pool)
            graphs[length] = graph, batch, scale, loss
        graph, static, static_scale, loss = graphs[length]
        for name, tensor in batch.items():
            static[name].copy_(tensor)
        static_scale.copy_(scale)
        graph.replay()
        return loss.clone()

    return run


def make(model, examples, ahead, plan, plain, pad_id, state, logits_at_once):
    """Returns (add, sizes): train_qlora's add_gradients by graphs, and what its micro-batches are.

    ahead: the row numbers of every step of the run; plan: a memory_estimate.Plan; plain(rows, tokens=…,
    total=…, state=…) computes rows that are longer than a graph's, with their layers checkpointed.
    """
    import torch

    decoder, runners = model.get_base_model().get_decoder(), {}
    alone = SimpleNamespace(device=state.device, num_processes=1, process_index=0)  # its rows are dealt out
    # Rows as long as the real ones, without their tokens: there may be a hundred thousand.
    rows = [
        {"input_ids": range(len(e["input_ids"])), "labels": range(batching.trained_tokens([e]) + 1)}
        for e in examples
    ]

    def checkpoint(wanted):
        for layer in decoder.layers:
            layer.gradient_checkpointing = wanted

    def runner(tokens):
        if tokens not in runners:
            packs = [
                p
                for numbers in ahead
                for p in memory_plan.split_packs([rows[i] for i in numbers], tokens, state)[0]
            ]
            packs = [(batching.total_tokens(p), batching.trained_tokens(p)) for p in packs]
            runners[tokens] = make_runner(model, packs, pad_id, state.device, logits_at_once, plan)
        return runners[tokens]

    def again(tokens):
        return max(1, plan.checkpointed * tokens // plan.tokens)

    def sizes(rows, tokens):
        packs, long = memory_plan.split_packs(
            rows, tokens, state
        )  # a row that is a pack's only one may still leave it
        return [(True, batching.total_tokens(p)) for p in packs] + [
            (False, batching.length(row)) for row in long
        ]

    def add(rows, tokens):
        if tokens not in runners:
            runners.clear()  # memory was full
        packs, long = memory_plan.split_packs(rows, tokens, state)
        total = batching.trained_tokens(rows)
        checkpoint(False)
        parts = [runner(tokens)(p, total) for p in packs]
        if long:
            checkpoint(True)
            parts.append(plain(long, tokens=again(tokens), total=total, state=alone))
        return sum(parts, torch.zeros((), device=state.device))

    return add, sizes
