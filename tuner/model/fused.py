"""The same layers in fewer kernels that keep less for the backward pass."""

from functools import partial

from tuner.model import attention, quantized


def fuse_layers(model):
    """Has the model's layers compute the same in fewer kernels, keep less, and never wait for the GPU."""
    fuse_norms_and_gates(model)
    fuse_lora(model)
    attention.register_packed_attention()


def fuse_norms_and_gates(model):
    """Has norms and gates keep their inputs alone for the backward pass, and compute the rest anew.

    A norm of transformers 5.20 keeps three tensors in fp32 and is eight kernels; torch has one that is one.
    """
    import torch
    from transformers.models.gemma3 import modeling_gemma3

    def normed(values, epsilon):
        return torch.nn.functional.rms_norm(values, values.shape[-1:], None, epsilon)

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values, scale, epsilon):
            ctx.save_for_backward(values, scale)
            ctx.epsilon = epsilon
            return normed(values.float(), epsilon).mul_(scale).to(values.dtype)

        @staticmethod
        def backward(ctx, gradient):
            values, scale = ctx.saved_tensors
            with torch.enable_grad():
                whole = values.detach().float().requires_grad_()
                result = torch.autograd.grad(normed(whole, ctx.epsilon), whole, gradient * scale)[0]
            return result.to(values.dtype), None, None

    class Gate(torch.autograd.Function):
        @staticmethod
        def forward(ctx, gate, values):
            ctx.save_for_backward(gate, values)
            return torch.nn.functional.gelu(gate, approximate="tanh").mul_(values)

        @staticmethod
        def backward(ctx, gradient):
            gate, values = ctx.saved_tensors
            opened = torch.nn.functional.gelu(gate, approximate="tanh").mul_(gradient)
            return torch.ops.aten.gelu_backward(gradient * values, gate, approximate="tanh"), opened

    def norm(layer, scale, values):
        return Norm.apply(values, scale, layer.eps)

    def gated(layer, values):
        return layer.down_proj(Gate.apply(layer.gate_proj(values), layer.up_proj(values)))

    decoder = model.get_base_model().get_decoder()
    for layer in decoder.modules():
        if isinstance(layer, modeling_gemma3.Gemma3RMSNorm):
            layer.forward = partial(norm, layer, 1 + layer.weight.detach().float())
        elif isinstance(layer, modeling_gemma3.Gemma3MLP):
            layer.forward = partial(gated, layer)


def fuse_lora(model):
    """Has a projection and its LoRA be one function: it keeps its input, which others share, and a mask.

    PEFT 0.21.2 keeps the input after dropout too, another one for each projection.
    """
    import bitsandbytes
    import torch
    from peft.tuners.lora import LoraLayer

    class Adapted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values, a, b, base, scaling, rate):
            rows, mask = values.reshape(-1, values.shape[-1]), None
            result, kept = base.product(rows), rows
            if rate:
                kept, mask = torch.native_dropout(rows, rate, True)
            hidden = kept @ a.to(rows.dtype).t()
            result.addmm_(hidden, b.to(rows.dtype).t(), alpha=scaling)
            ctx.save_for_backward(rows, mask, hidden, a, b)
            ctx.base, ctx.scaling, ctx.kept, ctx.shape = base, scaling, 1 / (1 - rate), values.shape
            return result.reshape(*values.shape[:-1], -1)

        @staticmethod
        def backward(ctx, gradient):
            rows, mask, hidden, a, b = ctx.saved_tensors
            gradient = gradient.reshape(-1, gradient.shape[-1])
            inner = (gradient @ b.to(rows.dtype)).mul_(ctx.scaling)
            for_rows = ctx.base.back(gradient)
            if mask is None:
                for_rows.addmm_(inner, a.to(rows.dtype))
            else:
                for_rows.addcmul_(inner @ a.to(rows.dtype), mask, value=ctx.kept)
                rows = torch.ops.aten.native_dropout_backward(rows, mask, ctx.kept)
            for_b = attention.fp32_product(gradient.t(), hidden).mul_(ctx.scaling)
            return (
                for_rows.reshape(ctx.shape),
                attention.fp32_product(inner.t(), rows),
                for_b,
                None,
                None,
                None,
            )

    def adapted(layer, base, values):
        name = layer.active_adapters[0]
        rate = getattr(layer.lora_dropout[name], "p", 0.0) if layer.training else 0.0
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        return Adapted.apply(values, a, b, base, layer.scaling[name], rate)

    for layer in model.get_base_model().get_decoder().modules():
        if isinstance(layer, LoraLayer):
            eight = isinstance(layer.base_layer, bitsandbytes.nn.Linear8bitLt)
            layer.forward = partial(
                adapted, layer, (quantized.eight_bits if eight else quantized.four_bits)(layer.base_layer)
            )
