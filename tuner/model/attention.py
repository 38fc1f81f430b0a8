"""Attention of packed rows: masks, and a kernel-free kind of it that sums in a fixed order."""

from contextlib import contextmanager

PACKED_ATTENTION = "packed"  # our own kind, by transformers' name for it
MAX_EXPLICIT_ATTENTION = 1024  # tokens; a longer sequence's attention weights are better never written down


def attention_masks(model, own, behind):
    """Returns what is added to the scores of attention, (rows, 1, asking, asked), by the kind of the layer.

    own: (rows or 1, asking or 1, asked), whether a token is of the row that asks; behind: (asking, asked), by
    how many places it is behind the one that asks.
    """
    import torch

    dtype, window = model.get_input_embeddings().weight.dtype, model.config.get_text_config().sliding_window
    seen, masks = own & (behind >= 0), {}
    for kind, mask in (("full_attention", seen), ("sliding_attention", seen & (behind < window))):
        added = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        masks[kind] = added.masked_fill_(~mask, torch.finfo(dtype).min)[:, None]
    return masks


def fp32_product(a, b):
    """Returns the product in fp32 of matrices, or batches of them, in any type."""
    import torch

    if not a.is_cuda or a.dtype == torch.float32:
        return a @ b
    return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=torch.float32)


def register_packed_attention():
    """Adds ATTENTION to what transformers knows: products of matrices, and the same again for the gradient.

    torch's own adds up gradients in an order of chance, so that no run would be like another; and cuDNN's,
    which torch takes on an H100, is compiled for the shapes at hand when a machine first sees them (2 s).
    """
    import torch
    from transformers import AttentionInterface

    def weigh(queries, keys, mask):
        scores = fp32_product(queries, keys.transpose(1, 2))
        scores.view(len(keys), -1, *mask.shape[2:]).add_(mask)
        return scores.softmax(-1)

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, queries, keys, values, mask):
            ctx.save_for_backward(queries, keys, values, mask)
            return weigh(queries, keys, mask).to(values.dtype) @ values

        @staticmethod
        def backward(ctx, gradient):
            queries, keys, values, mask = ctx.saved_tensors
            weights = weigh(queries, keys, mask)
            for_values = weights.to(values.dtype).transpose(1, 2) @ gradient
            for_weights = fp32_product(gradient, values.transpose(1, 2))
            scores = torch.ops.aten._softmax_backward_data(for_weights, weights, -1, weights.dtype)
            scores = scores.to(values.dtype)
            return scores @ keys, scores.transpose(1, 2) @ queries, for_values, None

    def attend(layer, queries, keys, values, attention_mask, scaling, **_):
        groups = keys.shape[1]  # of heads that have keys and values in common
        one = (queries * scaling).reshape(groups, -1, queries.shape[-1])
        result = Attention.apply(one, keys[0], values[0], attention_mask)
        return result.view(queries.shape).transpose(1, 2), None

    AttentionInterface.register(PACKED_ATTENTION, attend)


@contextmanager
def packed_attention(config):
    """Has the layers of the text model with this config attend by ATTENTION meanwhile."""
    before, config._attn_implementation = config._attn_implementation, PACKED_ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before
