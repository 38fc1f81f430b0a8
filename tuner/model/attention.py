"""Attention of packed rows: masks, and attention by plain matrix products that sums in a fixed order."""

from contextlib import contextmanager

import torch
from transformers import AttentionInterface

PACKED_ATTENTION = "packed"  # the name under which transformers knows ours
MAX_EXPLICIT_ATTENTION = 1024  # tokens; the attention weights of a longer sequence take too much memory


def attention_masks(model, same_sequence, distance):
    """Return what to add to the attention scores, (rows, 1, queries, keys), for each type of layer.

    same_sequence: (rows or 1, queries or 1, keys), whether query and key are of one row; distance: (queries,
    keys), how many positions the key stands before the query.
    """
    dtype = model.get_input_embeddings().weight.dtype
    causal = same_sequence & (distance >= 0)
    in_window = causal & (distance < model.config.get_text_config().sliding_window)
    masks = {}
    for layer_type, visible in (("full_attention", causal), ("sliding_attention", in_window)):
        bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        masks[layer_type] = bias.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]
    return masks


def fp32_product(a, b):
    """Return the fp32 product of two matrices, or batches of matrices, of any dtype."""
    if not a.is_cuda or a.dtype == torch.float32:
        return a @ b
    return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=torch.float32)


def attention_weights(queries, keys, mask):
    """Return the softmax of the masked scores, in fp32: (key/value heads, group × queries, keys)."""
    scores = fp32_product(queries, keys.transpose(1, 2))
    scores.view(len(keys), -1, *mask.shape[2:]).add_(mask)
    return scores.softmax(-1)


class PackedAttention(torch.autograd.Function):
    """Attention that keeps its inputs alone and computes the weights again in the backward pass.

    queries: (key/value heads, group × tokens, head_dim), scaled; keys and values: (key/value heads, tokens,
    head_dim); mask: (1, 1, tokens, tokens), added to the scores.
    """

    @staticmethod
    def forward(ctx, queries, keys, values, mask):
        ctx.save_for_backward(queries, keys, values, mask)
        return attention_weights(queries, keys, mask).to(values.dtype) @ values

    @staticmethod
    def backward(ctx, grad_output):
        queries, keys, values, mask = ctx.saved_tensors
        weights = attention_weights(queries, keys, mask)
        grad_values = weights.to(values.dtype).transpose(1, 2) @ grad_output
        grad_weights = fp32_product(grad_output, values.transpose(1, 2))
        grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        grad_scores = grad_scores.to(values.dtype)
        return grad_scores @ keys, grad_scores.transpose(1, 2) @ queries, grad_values, None


def attend_packed(layer, queries, keys, values, attention_mask, scaling, **_):
    """Attend as transformers asks for it: (1, heads, tokens, head_dim) → (1, tokens, heads, head_dim)."""
    kv_heads = keys.shape[1]
    grouped = (queries * scaling).reshape(kv_heads, -1, queries.shape[-1])
    output = PackedAttention.apply(grouped, keys[0], values[0], attention_mask)
    return output.view(queries.shape).transpose(1, 2), None


def register_packed_attention():
    """Add PACKED_ATTENTION to the attention functions that transformers knows.

    torch's own sums gradients in a random order, so that no two runs would be alike; and cuDNN's, which torch
    takes on an H100, is compiled for each shape when a machine first sees it (2 s).
    """
    AttentionInterface.register(PACKED_ATTENTION, attend_packed)


@contextmanager
def packed_attention(config, name=PACKED_ATTENTION):
    """Make the layers of the text model with this config use the attention of this name within the block."""
    before, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = before
