"""The loss on a CPU: no pads but in the attention, and never more than a part of the logits."""

import torch

from tuner.model import attention, cpu_layers

VOCABULARY_AT_ONCE = 8192  # rows of the head, 21 MB with 640 columns: they stay in cache for both products


def loss_and_predictions(model, batch):
    """Return the summed cross entropy of a padded batch's trained tokens, and the most likely token for each.

    model: wrapped by lora.add_lora; batch: input_ids, attention_mask, labels, (rows, longest).
    """
    input_ids, attention_mask, labels = batch
    trained = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
    hidden = hidden_states(model, input_ids, attention_mask.bool())[trained[attention_mask.bool()]]
    head = model.get_base_model().get_output_embeddings().weight
    return StreamedCrossEntropy.apply(hidden, head, labels[:, 1:][trained[:, :-1]])


def hidden_states(model, input_ids, present):
    """Return the last hidden states of the tokens that are no pads, (tokens, width), row after row.

    input_ids, present: (rows, longest). Rows of the calls that we train on have a third of pads.
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
    written and read again some seven times, on pages that the system had to clear first. Its sums of 8,192
    are also nearer to float64 than torch's: 1e-6 off in the gradient, not 2e-5.
    """

    @staticmethod
    def forward(ctx, hidden, head, targets):
        highest = hidden.new_full((len(hidden), 1), -torch.inf)
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
                expected.mul_(scale).add_(cpu_layers.product(weights, rows.t()))
        target_rows = head.index_select(0, targets)
        losses = (highest + total.log())[:, 0] - (hidden * target_rows).sum(-1)
        ctx.save_for_backward(expected.div_(total).sub_(target_rows))
        ctx.mark_non_differentiable(predictions := predictions[:, 0])
        return losses.sum(), predictions

    @staticmethod
    def backward(ctx, loss_gradient, _):
        return ctx.saved_tensors[0] * loss_gradient, None, None
