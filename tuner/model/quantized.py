"""Multiply by layers of 4 and 8 bits without waiting for the GPU, as a CUDA graph must."""

from types import SimpleNamespace


def four_bits(layer):
    """Returns product(values) and back(gradient) of a layer of 4 bits: × weight transposed, and × weight."""
    import bitsandbytes

    state = layer.weight.quant_state

    def product(values):
        return bitsandbytes.matmul_4bit(values, layer.weight, quant_state=state)

    def back(gradient):
        return gradient @ bitsandbytes.functional.dequantize_4bit(layer.weight, state).to(gradient.dtype)

    return SimpleNamespace(product=product, back=back)


def eight_bits(layer):
    """Returns product(values) and back(gradient) of a layer of 8 bits: × weight transposed, and × weight.

    LLM.int8 (arXiv 2208.07339) multiplies the columns that have an outlier in 16 bits. bitsandbytes 0.50.2
    waits for the GPU to tell which they are, and a graph cannot. Here all are so multiplied, the others as 0.
    """
    import torch

    if layer.weight.CB is not None:
        layer.init_8bit_state()
    state = layer.state
    scale = state.SCB / 127  # of an output; what is multiplied by it here is smaller than the weight

    def product(values):
        half = values.half()
        outliers = half.abs() >= state.threshold
        columns = outliers.any(0)
        rows, scales, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(half.masked_fill_(outliers, 0), 0.0)
        rows.masked_fill_(columns, 0)
        dtype = values.dtype
        result = torch.ops.bitsandbytes.int8_scaled_mm(rows, state.CB, scales, state.SCB, dtype=dtype)
        return result.add_((values.masked_fill(~columns, 0) @ state.CB.to(dtype).t()).mul_(scale))

    def back(gradient):
        return (gradient * scale).to(gradient.dtype) @ state.CB.to(gradient.dtype)

    return SimpleNamespace(product=product, back=back)
