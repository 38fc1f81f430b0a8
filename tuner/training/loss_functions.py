"""The loss of trained tokens alone: of padded examples, and of packed ones with its gradient beside it."""

from contextlib import nullcontext

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from tuner.model import attention
from tuner.training import cpu_loss
from tuner.training.memory_plan import LOGITS_AT_ONCE


def loss_and_predictions(model, batch, logits_at_once=None):
    """Return the summed cross entropy of a padded batch's trained tokens, and the most likely token for each.

    Logits are computed for trained positions only, `logits_at_once` of them at a time (None: LOGITS_AT_ONCE),
    and again in the backward pass instead of being kept; on a CPU as in cpu_loss. Predictions are in the
    order in which labels[:, 1:] has the trained tokens.
    """
    input_ids, attention_mask, labels = batch
    base = model.get_base_model()
    if labels.device.type == "cpu" and not base.is_gradient_checkpointing:
        return cpu_loss.loss_and_predictions(model, batch)
    head = base.get_output_embeddings()
    trained = labels[:, 1:] != -100
    targets = labels[:, 1:][trained]

    def chunk(hidden, targets):
        logits = head(hidden).float()
        return cross_entropy(logits, targets, reduction="sum"), logits.detach().argmax(-1)

    # The LoRA weights are fp32; autocast computes their products in the dtype of the rest. It keeps its
    # copies of them until it is left: around more than one step, they would be those of the first.
    compute_dtype = base.get_input_embeddings().weight.dtype
    with torch.autocast(labels.device.type, dtype=torch.bfloat16, enabled=compute_dtype == torch.bfloat16):
        # The text model alone: the multimodal class around it would ask for the type of every token.
        hidden = base.get_decoder()(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        hidden = hidden[:, :-1][trained]
        size = logits_at_once or LOGITS_AT_ONCE
        chunks = zip(hidden.split(size), targets.split(size), strict=True)
        results = [checkpoint(chunk, *pair, use_reentrant=False) for pair in chunks]
    return sum(loss for loss, _ in results), torch.cat([predictions for _, predictions in results])


def packed_loss(model, batch, logits_at_once):
    """Return the summed cross entropy of a packed micro-batch, a dict as collate_packed returns it."""
    base = model.get_base_model()
    sequence_ids = batch["sequence_ids"]
    index = torch.arange(len(sequence_ids), device=sequence_ids.device)
    distance = index[:, None] - index
    masks = attention.attention_masks(model, (sequence_ids[:, None] == sequence_ids)[None], distance)
    input_ids, position_ids = batch["input_ids"][None], batch["position_ids"][None]
    decoder = base.get_decoder()
    short = len(sequence_ids) <= attention.MAX_EXPLICIT_ATTENTION
    with attention.packed_attention(decoder.config) if short else nullcontext():
        hidden = decoder(input_ids=input_ids, position_ids=position_ids, attention_mask=masks)
    trained = hidden.last_hidden_state[0].index_select(0, batch["loss_positions"])
    head = base.get_output_embeddings().weight
    return FusedCrossEntropy.apply(trained, head, batch["targets"], logits_at_once)


class FusedCrossEntropy(torch.autograd.Function):
    """Summed cross entropy with its gradient for `hidden` worked out beside it: no logits are kept.

    hidden: (tokens, width), head: (vocabulary, width), targets: (tokens,), −100 for none; logits are computed
    for `logits_at_once` tokens at a time.
    """

    @staticmethod
    def forward(ctx, hidden, head, targets, logits_at_once):
        gradient = torch.empty_like(hidden)
        loss = torch.zeros((), device=hidden.device)
        chunks = (tensor.split(logits_at_once) for tensor in (hidden, targets, gradient))
        for states, target, chunk_gradient in zip(*chunks, strict=True):
            weight = (target != -100).float()
            target = target.clamp(min=0)[:, None]
            logits = (states @ head.t()).float()
            log_sum = logits.logsumexp(-1)
            loss += ((log_sum - logits.gather(1, target)[:, 0]) * weight).sum()
            probabilities = logits.sub_(log_sum[:, None]).exp_()
            probabilities.scatter_add_(1, target, probabilities.new_full(target.shape, -1.0))
            chunk_gradient.copy_(probabilities.mul_(weight[:, None]).to(head.dtype) @ head)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, loss_gradient):
        return ctx.saved_tensors[0] * loss_gradient, None, None, None


def checkpoint_layers(model):
    """Make the backward pass recompute each layer's activations instead of keeping them.

    Reentrant: bitsandbytes 0.50.2 puts the input of an 8-bit layer where the other kind of checkpointing does
    not see it, so all of them were kept: 2.5 GiB more with 2048 tokens, 4B and 8 bits.
    """
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()  # or nothing in a layer would have a gradient
