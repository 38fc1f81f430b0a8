"""Training as fast as the GPU is: a micro-batch's forward and backward pass as one CUDA graph.

A micro-batch of Gemma-3-4b is 13,000 kernels, launched one by one from Python: half a second for what takes
the GPU a tenth of it. A captured graph launches them at once, but is bound to the shapes of its tensors. So
the examples of a micro-batch are packed: one after the other in a sequence of one of a few lengths, each
attending to itself alone. Only the sequence's end is padded, and no layer is recomputed for its gradient.
"""

import math
from collections import Counter
from functools import partial

import torch

from tuner.data import batching
from tuner.model.attention import MAX_EXPLICIT_ATTENTION
from tuner.training import collate, loss_functions, memory_plan
from tuner.training.accumulation import GradientAccumulator
from tuner.training.memory_plan import LOGITS_AT_ONCE, MULTIPLE

LENGTH_BUCKETS = 16  # the lengths of packed sequences are multiples of a sixteenth of the longest one
CAPTURE_COST_TOKENS = 10_000  # computed in the time that a capture takes: what one more length has to save
MIN_REPLAYS = 1  # a run of this many micro-batches, or fewer, is worth no capture
PATTERN = 6  # layers: in Gemma 3 every sixth attends to all tokens, the others to those in a window


class GraphAccumulator(GradientAccumulator):
    """Adds up the gradient of a step's mean loss by CUDA graphs of packed micro-batches.

    Examples longer than the token budget are padded, their layers recomputed for the gradient.
    """

    shrink = 7 / 8  # the plan may be wrong by this much

    def __init__(self, model, weights, pad_id, state, plan):
        """plan: a memory_plan.Plan, the memory that graphs may take."""
        super().__init__(model, weights, pad_id, state, plan.tokens)
        self.plan, self.steps, self.graphs = plan, [], {}

    def expect(self, steps):
        """Choose the lengths of graphs for the examples of every step of the run, before the first one.

        Only lengths are read: `input_ids` and `labels` may be ranges as long as the real ones.
        """
        self.steps = steps

    def add_gradient(self, examples, tokens):
        """Add the gradient of a step's examples, packed up to `tokens`; return the loss."""
        packs, long = memory_plan.split_packs(examples, tokens, self.state)
        total = batching.trained_tokens(examples)
        self._recompute_layers(False)
        losses = [self._graphs(tokens).add_gradient(pack, total) for pack in packs]
        if long:
            self._recompute_layers(True)
            padded_tokens = max(1, self.plan.checkpointed * tokens // self.plan.tokens)
            losses.append(self.add_padded(long, padded_tokens, total))
        return sum(losses, torch.zeros((), device=self.state.device))

    def sizes(self, examples, tokens):
        """Return [(whether it can be cut, tokens), …] of the micro-batches of a step."""
        packs, long = memory_plan.split_packs(examples, tokens, self.state)
        # A row that is alone in a pack can still leave it.
        packed = [(True, batching.total_tokens(pack)) for pack in packs]
        return packed + [(False, batching.length(row)) for row in long]

    def _graphs(self, tokens):
        """Return the graphs of packs of at most `tokens`; those of another budget are freed."""
        if tokens not in self.graphs:
            self.graphs.clear()  # memory was full
            split = (memory_plan.split_packs(step, tokens, self.state)[0] for step in self.steps)
            packs = [pack for step_packs in split for pack in step_packs]
            sizes = [(batching.total_tokens(pack), batching.trained_tokens(pack)) for pack in packs]
            self.graphs[tokens] = PackedGraphs(self.model, sizes, self.pad_id, self.state.device, self.plan)
        return self.graphs[tokens]

    def _recompute_layers(self, wanted):
        for layer in self.model.get_base_model().get_decoder().layers:
            layer.gradient_checkpointing = wanted


class PackedGraphs:
    """The forward and backward pass of a pack as CUDA graphs, one for each of a few lengths."""

    def __init__(self, model, sizes, pad_id, device, plan):
        """sizes: [(tokens, trained tokens), …] of every pack to come; plan: the memory they take."""
        self.model, self.pad_id, self.device, self.plan = model, pad_id, device, plan
        self.lengths = choose_length_buckets([tokens for tokens, _ in sizes])
        self.slots = align(max(trained for _, trained in sizes))
        self.captures = len(sizes) > MIN_REPLAYS
        self.graphs, self.pool = {}, torch.cuda.graph_pool_handle()  # they share their memory

    def add_gradient(self, pack, total):
        """Add the gradient of (a pack's summed loss / total) to the weights' own; return that loss."""
        length = next(length for length in self.lengths if length >= batching.total_tokens(pack))
        tensors = collate.collate_packed(pack, length, self.slots, self.pad_id)
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in tensors.items()}
        scale = torch.tensor(1 / total, device=self.device)
        if not self.captures:
            return self._compute(batch, scale)
        if not self.graphs or (length not in self.graphs and length > MAX_EXPLICIT_ATTENTION):
            self._warm_up(batch)
        if length not in self.graphs:
            self._check_free_memory(length)
            graph, loss = capture(partial(self._compute, batch, scale), self.pool)
            self.graphs[length] = graph, batch, scale, loss
        graph, static_batch, static_scale, loss = self.graphs[length]
        for name, tensor in batch.items():
            static_batch[name].copy_(tensor)
        static_scale.copy_(scale)
        graph.replay()
        return loss.clone()

    def _compute(self, batch, scale):
        loss = loss_functions.packed_loss(self.model, batch, LOGITS_AT_ONCE) * scale
        loss.backward()
        return loss.detach()

    def _warm_up(self, batch):
        """Load what is loaded at its first use, which a capture must not do; add gradients of 0.

        cuDNN's attention is compiled for each length, and needs memory for that: on an H100, torch 2.11, now
        and then a capture failed by CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED.
        """
        decoder = self.model.get_base_model().get_decoder()
        layers, random_state = decoder.layers, torch.cuda.get_rng_state(self.device)
        decoder.layers = layers[:PATTERN]
        try:
            self._compute(batch, torch.zeros((), device=self.device))
        finally:
            decoder.layers = layers
            torch.cuda.set_rng_state(random_state, self.device)

    def _check_free_memory(self, length):
        """Raise OutOfMemoryError if the GPU has no room for the graph of one more length."""
        needed = self.plan.kept * max(0, length - max(self.graphs, default=0))
        if not self.graphs:
            needed += self.plan.logits * min(self.slots, LOGITS_AT_ONCE)
        check_free_memory(needed, self.device)


def capture(work, pool=None):
    """Return the CUDA graph of work(), and what work() returned; raise torch.OutOfMemoryError."""
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
    """Raise torch.OutOfMemoryError if the GPU has fewer than `size` bytes left.

    A capture must not be what finds out: torch never frees the memory of one that failed (PyTorch #190308).
    """
    torch.cuda.empty_cache()
    torch.empty(int(size), dtype=torch.uint8, device=device)
    torch.cuda.empty_cache()


def align(tokens):
    """Return the least multiple of MULTIPLE that is no less than `tokens`."""
    return MULTIPLE * math.ceil(tokens / MULTIPLE)


def choose_length_buckets(sizes):
    """Return the lengths, ascending, that packs of these sizes are padded to: few, as each is captured."""
    longest = align(max(sizes))
    step = align(longest / LENGTH_BUCKETS)
    counts = Counter(min(longest, step * math.ceil(size / step)) for size in sizes)
    chosen = [max(counts)]

    def padding(lengths):
        return sum((min(n for n in lengths if n >= size) - size) * count for size, count in counts.items())

    while candidates := sorted(set(counts) - set(chosen)):
        best = min(candidates, key=lambda length: padding([*chosen, length]))
        if padding(chosen) - padding([*chosen, best]) < CAPTURE_COST_TOKENS:
            break
        chosen.append(best)
    return sorted(chosen)
