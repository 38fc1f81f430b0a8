"""The loss on a CPU: no pads but in the attention, and never more than a part of the logits."""

import torch

from tuner.model import attention, cpu_layers

VOCABULARY_AT_ONCE = 8192  # rows of the head, 21 MB with 640 columns: they stay in cache for both products
NEGLIGIBLE = 2**-14  # below this probability, a token of the vocabulary is left out of the gradient


def loss_and_predictions(model, batch):
    """Return the summed cross entropy of a padded batch's trained tokens, and the most likely token for each.

    model: wrapped by lora.add_lora; batch: input_ids, attention_mask, labels, (rows, longest).
    """
    input_ids, _, labels = batch
    trained = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
    needed = trained.flip(1).cummax(1).values.flip(1)  # nothing looks back at what follows the last of them
    hidden = hidden_states(model, input_ids, needed)[trained[needed]]
    head = model.get_base_model().get_output_embeddings().weight
    return StreamedCrossEntropy.apply(hidden, head, labels[:, 1:][trained[:, :-1]])


def hidden_states(model, input_ids, present):
    """Return the last hidden states of the tokens that are present, (tokens, width), row after row.

    input_ids, present: (rows, longest); of a row the tokens up to its last needed one are present. A third of
    a batch of our rows are pads.
    """
    positions = torch.arange(present.shape[1])
    masks = attention.attention_masks(model, present[:, None], positions[:, None] - positions)
    decoder = model.get_base_model().get_decoder()
    with attention.packed_attention(decoder.config, cpu_layers.UNPADDED_ATTENTION):
        return decoder(
            input_ids=input_ids[present][None],
            position_ids=positions.expand_as(present)[present][None],
            attention_mask=masks,
        ).last_hidden_state[0]


class StreamedCrossEntropy(torch.autograd.Function):
    """Summed cross entropy, with its gradient for `hidden` worked out beside it, and the most likely tokens.

    hidden: (tokens, width), head: (vocabulary, width), targets: (tokens,). The softmax is summed up part by
    part of the vocabulary, as FlashAttention does over keys (arXiv 2205.14135): 262,144 logits a token were
    written and read again some seven times, on pages that the system had to clear first. The gradient
    leaves out what has no probability to speak of, as Cut Cross-Entropy does (arXiv 2411.09009): on the base,
    7 % of the vocabulary are left, and the gradient is 1.7 % off.
    """

    @staticmethod
    def forward(ctx, hidden, head, targets):
        target_rows = head.index_select(0, targets)
        target_logits = (hidden * target_rows).sum(-1, keepdim=True)
        highest = torch.full_like(target_logits, -torch.inf)
        total, expected = torch.zeros_like(highest), torch.zeros_like(hidden)
        predictions = torch.zeros_like(targets)[:, None]
        for start in range(0, len(head), VOCABULARY_AT_ONCE):
            rows = head[start : start + VOCABULARY_AT_ONCE]
            logits = cpu_layers.product(hidden, rows)
            part_highest, part_predictions = logits.max(-1, keepdim=True)
            predictions = torch.where(part_highest > highest, part_predictions + start, predictions)
            new_highest = torch.maximum(highest, part_highest)
            scale, highest = (highest - new_highest).exp_(), new_highest
            weights = logits.sub_(highest).exp_()
            total.mul_(scale).add_(weights.sum(-1, keepdim=True))
            if ctx.needs_input_grad[0]:
                least_total = torch.maximum(total, (target_logits - highest).exp_())  # it only grows
                expected.mul_(scale).add_(likely_product(weights, rows, least_total * NEGLIGIBLE))
        losses = (highest + total.log() - target_logits)[:, 0]
        ctx.save_for_backward(expected.div_(total).sub_(target_rows))
        ctx.mark_non_differentiable(predictions := predictions[:, 0])
        return losses.sum(), predictions

    @staticmethod
    def backward(ctx, loss_gradient, _):
        return ctx.saved_tensors[0] * loss_gradient, None, None


def likely_product(weights, rows, least):
    """Return weights × rows without the rows whose weight is above `least` for no token.

    weights: (tokens, part of the vocabulary), rows: (part of the vocabulary, width), least: (tokens, 1).
    """
    likely = (weights > least).any(0).nonzero()[:, 0]
    if not len(likely):
        return 0
    return cpu_layers.product(weights.index_select(1, likely), rows.index_select(0, likely).t())
