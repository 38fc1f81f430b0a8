"""Layers that take less time on a CPU: products by a frozen weight, dropout, attention of unpadded rows."""

import bitsandbytes
import torch
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import AttentionInterface

UNPADDED_ATTENTION = "unpadded"  # the name under which transformers knows ours
# The op is not in torch for a Mac, and of no public interface.
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def replace_layers(model):
    """Make the model's 4-bit layers and dropouts those of this module, in place."""
    AttentionInterface.register(UNPADDED_ATTENTION, attend_unpadded)
    ours = {bitsandbytes.nn.Linear4bit: Linear4bit, torch.nn.Dropout: Dropout}
    for module in model.modules():
        module.__class__ = ours.get(type(module), type(module))


# -------------------------------------------------------------------------------------------- products


def product(inputs, weight):
    """Return inputs × weightᵀ, both fp32, without a gradient; weight: (outputs, inputs), any strides.

    torch 2.13 has MKL multiply fp32, which on an AMD CPU makes no use of AVX-512: on 2 cores of a Zen 5
    oneDNN took 0.4 of its time, and 0.9 where both had AVX2 alone (600 × 640 by 640 × 2048).
    """
    if ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(inputs, weight, None, "none", [], "")
    return linear(inputs, weight)


class Linear4bit(bitsandbytes.nn.Linear4bit):
    """A frozen 4-bit layer, dequantized once: 0.4 GB with 270M, for 3 to 14 % of a step of four rows."""

    dequantized = None

    def forward(self, inputs):
        if inputs.dtype != torch.float32 or self.bias is not None:
            return super().forward(inputs)
        if self.dequantized is None:
            weight = bitsandbytes.functional.dequantize_4bit(self.weight, self.weight.quant_state)
            self.dequantized = weight.float()
        return FrozenProduct.apply(inputs, self.dequantized)


class FrozenProduct(torch.autograd.Function):
    """inputs × weightᵀ for a weight that has no gradient."""

    @staticmethod
    def forward(ctx, inputs, weight):
        ctx.weight = weight
        return product(inputs, weight)

    @staticmethod
    def backward(ctx, grad_output):
        return product(grad_output, ctx.weight.t()), None


# --------------------------------------------------------------------------------------------- dropout


class Dropout(torch.nn.Dropout):
    """Dropout whose mask is of 16 random bits an element: a fifth of the time of torch's bernoulli_."""

    def forward(self, inputs):
        return FastDropout.apply(inputs, self.p) if self.training and self.p else inputs


class FastDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, p):
        ctx.kept, ctx.scale = random_mask(inputs.shape, p), 1 / (1 - p)
        return (inputs * ctx.kept).mul_(ctx.scale)

    @staticmethod
    def backward(ctx, grad_output):
        return (grad_output * ctx.kept).mul_(ctx.scale), None


def random_mask(shape, p):
    """Return a mask that is true with a probability of 1 − p (to 2⁻¹⁶) from torch's generator."""
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
