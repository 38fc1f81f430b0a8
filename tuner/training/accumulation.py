"""The gradient of a step, added up in micro-batches that fit the memory; retried where they do not."""

import torch

from tuner.data import batching
from tuner.system.console import print_main, printable
from tuner.system.errors import UserError
from tuner.training import collate, loss_functions
from tuner.training.memory_plan import MICRO_BATCH_TOKENS


class GradientAccumulator:
    """Adds up the gradient of a step's mean loss in padded micro-batches.

    Owns the token budget of a micro-batch (`tokens`), and lowers it where the GPU's memory is full. The loss
    is summed and divided by the trained tokens of the whole step, so micro-batches and processes of any size
    give the same gradient.
    """

    shrink = 1 / 2  # of the budget, when memory is full

    def __init__(self, model, weights, pad_id, state, tokens=MICRO_BATCH_TOKENS):
        """weights: all that is trained, one tensor with a gradient; state: accelerate's PartialState."""
        self.model, self.weights, self.pad_id, self.state, self.tokens = model, weights, pad_id, state, tokens

    def accumulate(self, examples, seed):
        """Set weights.grad to this process's part of the gradient of a step's mean loss.

        examples: all of the step. seed: of its dropout, which depends on nothing that came before it, an
        evaluation least of all. Return the same part of the loss, a tensor. Raise UserError if the GPU's
        memory is full with one example.
        """

        def attempt(tokens):
            self.weights.grad.zero_()
            torch.manual_seed(seed)
            return self.add_gradient(examples, tokens)

        loss, self.tokens = retry_on_oom(
            attempt, lambda tokens: self.sizes(examples, tokens), self.tokens, self.shrink
        )
        return loss

    def add_gradient(self, examples, tokens):
        """Add the gradient of a step's examples in micro-batches of at most `tokens`; return the loss."""
        own = batching.shard(examples, self.state)
        return self.add_padded(own, tokens, batching.trained_tokens(examples))

    def add_padded(self, examples, tokens, total):
        """Add the gradient of (summed loss / total) of examples, longest first; return that loss."""
        loss = torch.zeros((), device=self.state.device)
        for micro_batch in batching.group_padded(examples, batching.length, tokens):
            batch = collate.collate_padded(micro_batch, self.pad_id, self.state.device)
            part = loss_functions.loss_and_predictions(self.model, batch)[0] / total
            part.backward()
            loss += part.detach()
        return loss

    def sizes(self, examples, tokens):
        """Return [(whether it can be cut, tokens), …] of the micro-batches of a step."""
        return padded_sizes(batching.shard(examples, self.state), tokens)


def padded_sizes(examples, tokens):
    """Return [(whether it has several examples, tokens), …] of padded micro-batches of at most `tokens`."""
    groups = batching.group_padded(examples, batching.length, tokens)
    return [(len(group) > 1, len(group) * batching.length(group[0])) for group in groups]


def retry_on_oom(work, sizes, tokens, shrink=1 / 2):
    """Return (work(tokens), tokens); where the GPU's memory is full, retry with a smaller budget of tokens.

    sizes(tokens) gives [(whether it can be cut, tokens), …] of the micro-batches; shrink: the new budget, as
    a part of the largest one that can be cut. Raise UserError if none can.
    """
    while True:
        try:
            return work(tokens), tokens
        except torch.OutOfMemoryError as error:
            reason = printable(str(error).split(" Process ")[0], 150)
        # Not within `except`: there the error would hold on to all that the work had in memory.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        micro_batches = sizes(tokens)
        largest = max(size for _, size in micro_batches)
        divisible = [size for can_be_cut, size in micro_batches if can_be_cut]
        if not divisible:
            raise UserError(
                f"GPU out of memory with one row of {largest} tokens ({reason}); train with "
                "--bits 4, close what else runs on it (nvidia-smi), shorten that row, or take a larger GPU"
            )
        tokens, shrink = int(max(divisible) * shrink), max(1 / 2, shrink * shrink)
        print_main(f"memory     GPU out of memory at {largest} tokens; retrying this step with {tokens}")


def all_reduce_step(loss, weights, state):
    """Sum a step's loss and gradient over the processes; return the loss as a number."""
    if state.num_processes > 1:
        torch.distributed.all_reduce(loss)
        torch.distributed.all_reduce(weights.grad)
    return loss.item()
