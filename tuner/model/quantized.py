"""Multiply by 4-bit and 8-bit layers: without waiting for the GPU, as a CUDA graph must, and on a CPU."""

import bitsandbytes
import torch

from tuner.model import cpu_layers


class NF4Linear:
    """The two products of a 4-bit layer: its inputs × weightᵀ, and its gradient × weight."""

    def __init__(self, layer):
        self.layer, self.quant_state = layer, layer.weight.quant_state

    def forward(self, inputs):
        return bitsandbytes.matmul_4bit(inputs, self.layer.weight, quant_state=self.quant_state)

    def backward(self, grad_output):
        weight = bitsandbytes.functional.dequantize_4bit(self.layer.weight, self.quant_state)
        return grad_output @ weight.to(grad_output.dtype)


class DequantizedLinear:
    """The two products of a 4-bit layer, dequantized once: 0.4 GB with 270M, for 3 to 14 % of a step."""

    def __init__(self, layer):
        weight = bitsandbytes.functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
        self.weight = weight.float()

    def forward(self, inputs):
        return cpu_layers.product(inputs, self.weight.to(inputs.dtype))

    def backward(self, grad_output):
        return cpu_layers.product(grad_output, self.weight.to(grad_output.dtype).t())


class Int8Linear:
    """The two products of an 8-bit layer: its inputs × weightᵀ, and its gradient × weight.

    LLM.int8 (arXiv 2208.07339) multiplies the columns that have an outlier in 16 bits. bitsandbytes 0.50.2
    waits for the GPU to say which these are, and a graph cannot. Here all columns are multiplied that way,
    those without an outlier as zeros.
    """

    def __init__(self, layer):
        if layer.weight.CB is not None:
            layer.init_8bit_state()
        self.state = layer.state
        self.scale = self.state.SCB / 127  # of each output; smaller than the weight, so multiplied first

    def forward(self, inputs):
        state = self.state
        half = inputs.half()
        outliers = half.abs() >= state.threshold
        columns = outliers.any(0)
        rows, scales, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(half.masked_fill_(outliers, 0), 0.0)
        rows.masked_fill_(columns, 0)
        dtype = inputs.dtype
        output = torch.ops.bitsandbytes.int8_scaled_mm(rows, state.CB, scales, state.SCB, dtype=dtype)
        in_16_bits = inputs.masked_fill(~columns, 0) @ state.CB.to(dtype).t()
        return output.add_(in_16_bits.mul_(self.scale))

    def backward(self, grad_output):
        return (grad_output * self.scale).to(grad_output.dtype) @ self.state.CB.to(grad_output.dtype)
