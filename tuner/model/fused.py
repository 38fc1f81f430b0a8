"""The same layers in fewer kernels that keep less for the backward pass."""

from functools import partial

import bitsandbytes
import torch
from peft.tuners.lora import LoraLayer
from torch.nn.functional import gelu, rms_norm
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP, Gemma3RMSNorm

from tuner.model import attention, cpu_layers, quantized


def fuse_layers(model, cpu=False):
    """Make the model's layers compute the same in fewer kernels, keep less, and never wait for the GPU.

    On a CPU LoRA's alone: memory is no limit there, and computing norms and gates twice takes 3 % longer.
    """
    fuse_lora(model, quantized.DequantizedLinear if cpu else quantized.NF4Linear)
    if not cpu:
        fuse_norms_and_gates(model)
        attention.register_packed_attention()


# ------------------------------------------------------------------------------------ norms and gates


def fuse_norms_and_gates(model):
    """Make norms and gates keep only their inputs for the backward pass, and compute the rest again.

    A norm of transformers 5.20 keeps three fp32 tensors and is eight kernels; torch has one that is one.
    """
    decoder = model.get_base_model().get_decoder()
    for layer in decoder.modules():
        if isinstance(layer, Gemma3RMSNorm):
            layer.forward = partial(norm_forward, layer, 1 + layer.weight.detach().float())
        elif isinstance(layer, Gemma3MLP):
            layer.forward = partial(mlp_forward, layer)


def norm_forward(layer, scale, hidden):
    return FusedRMSNorm.apply(hidden, scale, layer.eps)


def mlp_forward(layer, hidden):
    return layer.down_proj(FusedGeGLU.apply(layer.gate_proj(hidden), layer.up_proj(hidden)))


def normalize(hidden, epsilon):
    return rms_norm(hidden, hidden.shape[-1:], None, epsilon)


class FusedRMSNorm(torch.autograd.Function):
    """RMSNorm in fp32, times `scale`; the scale is frozen, and only the input is kept."""

    @staticmethod
    def forward(ctx, hidden, scale, epsilon):
        ctx.save_for_backward(hidden, scale)
        ctx.epsilon = epsilon
        return normalize(hidden.float(), epsilon).mul_(scale).to(hidden.dtype)

    @staticmethod
    def backward(ctx, grad_output):
        hidden, scale = ctx.saved_tensors
        with torch.enable_grad():
            hidden_fp32 = hidden.detach().float().requires_grad_()
            output = normalize(hidden_fp32, ctx.epsilon)
            grad_hidden = torch.autograd.grad(output, hidden_fp32, grad_output * scale)[0]
        return grad_hidden.to(hidden.dtype), None, None


class FusedGeGLU(torch.autograd.Function):
    """gelu(gate) × up, the middle of Gemma's MLP."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return gelu(gate, approximate="tanh").mul_(up)

    @staticmethod
    def backward(ctx, grad_output):
        gate, up = ctx.saved_tensors
        grad_up = gelu(gate, approximate="tanh").mul_(grad_output)
        return torch.ops.aten.gelu_backward(grad_output * up, gate, approximate="tanh"), grad_up


# ----------------------------------------------------------------------------------------------- LoRA


def fuse_lora(model, four_bits):
    """Make each projection and its LoRA one function that keeps its input, which others share, and a mask.

    four_bits: the class of the two products of a 4-bit layer. PEFT 0.21.2 keeps the input after dropout too,
    another one for each projection.
    """
    for layer in model.get_base_model().get_decoder().modules():
        if isinstance(layer, LoraLayer):
            eight_bits = isinstance(layer.base_layer, bitsandbytes.nn.Linear8bitLt)
            base = (quantized.Int8Linear if eight_bits else four_bits)(layer.base_layer)
            base.lora_scaling = layer.scaling[layer.active_adapters[0]]
            layer.forward = partial(lora_forward, layer, base)


def lora_forward(layer, base, inputs):
    name = layer.active_adapters[0]
    dropout = getattr(layer.lora_dropout[name], "p", 0.0) if layer.training else 0.0
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return FusedLoRA.apply(inputs, a, b, base, dropout)


class FusedLoRA(torch.autograd.Function):
    """base(x) + scaling · B·A·dropout(x); a: (rank, inputs), b: (outputs, rank).

    base: a quantized layer (quantized.py) with lora_scaling.
    """

    @staticmethod
    def forward(ctx, inputs, a, b, base, dropout):
        rows, mask = inputs.reshape(-1, inputs.shape[-1]), None
        output, dropped = base.forward(rows), rows
        if dropout and rows.is_cuda:
            dropped, mask = torch.native_dropout(rows, dropout, True)
        elif dropout:
            dropped, mask = cpu_layers.dropout(rows, dropout)
        hidden = dropped @ a.to(rows.dtype).t()
        output.addmm_(hidden, b.to(rows.dtype).t(), alpha=base.lora_scaling)
        ctx.save_for_backward(rows, mask, hidden, a, b)
        ctx.base, ctx.dropout_scale, ctx.shape = base, 1 / (1 - dropout), inputs.shape
        return output.reshape(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad_output):
        rows, mask, hidden, a, b = ctx.saved_tensors
        grad_output = grad_output.reshape(-1, grad_output.shape[-1])
        grad_hidden = (grad_output @ b.to(rows.dtype)).mul_(ctx.base.lora_scaling)
        grad_rows = ctx.base.backward(grad_output)
        if mask is None:
            grad_rows.addmm_(grad_hidden, a.to(rows.dtype))
        else:
            grad_rows.addcmul_(grad_hidden @ a.to(rows.dtype), mask, value=ctx.dropout_scale)
            rows = torch.ops.aten.native_dropout_backward(rows, mask, ctx.dropout_scale)
        grad_b = attention.fp32_product(grad_output.t(), hidden).mul_(ctx.base.lora_scaling)
        grad_a = attention.fp32_product(grad_hidden.t(), rows)
        return grad_rows.reshape(ctx.shape), grad_a, grad_b, None, None
