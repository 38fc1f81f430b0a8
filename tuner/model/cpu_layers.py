"""Layers that take less time on a CPU: products, dropout, attention of unpadded rows."""

import torch
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import AttentionInterface

UNPADDED_ATTENTION = "unpadded"  # the name under which transformers knows ours
# The op is not in torch for a Mac, and of no public interface.
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


# -------------------------------------------------------------------------------------------- products


def product(inputs, weight):
    """Return inputs × weightᵀ, of one dtype, without a gradient; weight: (outputs, inputs), any strides.

    torch 2.13 has MKL multiply fp32, which on an AMD CPU makes no use of AVX-512: on 2 cores of a Zen 5
    oneDNN took 0.4 of its time, and 0.9 where both had AVX2 alone (600 × 640 by 640 × 2048).
    """
    if ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(inputs, weight, None, "none", [], "")
    return linear(inputs, weight)


# --------------------------------------------------------------------------------------------- dropout


def dropout(inputs, p):
    """Return (inputs after dropout, mask) as torch.native_dropout does."""
    mask = random_mask(inputs.shape, p).to(inputs.dtype)  # booleans would be converted by each product
    return (inputs * mask).mul_(1 / (1 - p)), mask


def random_mask(shape, p):
    """Return a mask that is true with a probability of 1 − p (to 2⁻¹⁶), in a fifth of bernoulli_'s time."""
    count = shape.numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    return bits.view(torch.int16)[:count].view(shape) >= round(p * 2**16) - 2**15


# ------------------------------------------------------------------------------------------- attention


def attend_unpadded(layer, queries, keys, values, attention_mask, scaling, **_):
    """Attend within rows that stand end to end, padded here alone.

    queries, keys, values: (1, heads, tokens, head_dim); attention_mask: (rows, 1, longest, longest), added to
    the scores; where a row has a token, it may attend to itself. Return (1, tokens, heads, head_dim).
    """
    present = attention_mask[:, 0].diagonal(dim1=1, dim2=2) == 0

    def pad(states):
        padded = states.new_zeros(*present.shape, states.shape[1], states.shape[3])
        return padded.index_put((present,), states[0].transpose(0, 1)).transpose(1, 2)

    queries, keys, values = pad(queries), pad(keys), pad(values)
    output = scaled_dot_product_attention(
        queries, keys, values, attn_mask=attention_mask, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2)[present][None], None


AttentionInterface.register(UNPADDED_ATTENTION, attend_unpadded)
