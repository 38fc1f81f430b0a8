"""Norms and gates in fewer kernels: the numbers and gradients of transformers' own layers."""

import pytest
import torch
from transformers import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP, Gemma3RMSNorm

from tuner.model import fused


def outputs_and_gradients(function, *inputs):
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = function(*inputs)
    torch.manual_seed(1)
    (output.float() * torch.randn(output.shape)).sum().backward()
    return [output.detach(), *(tensor.grad for tensor in inputs)]


def norm(hidden):
    layer = Gemma3RMSNorm(hidden.shape[-1])
    torch.manual_seed(2)
    layer.weight = torch.nn.Parameter(torch.randn(hidden.shape[-1]), requires_grad=False)
    return layer, 1 + layer.weight


def test_a_norm_and_its_gradient_are_transformers():
    torch.manual_seed(0)
    hidden = torch.randn(2, 5, 32)
    layer, scale = norm(hidden)
    ours = outputs_and_gradients(lambda values: fused.norm_forward(layer, scale, values), hidden)
    theirs = outputs_and_gradients(layer, hidden)
    for our, their in zip(ours, theirs, strict=True):
        assert torch.allclose(our, their, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_keeps_its_input_and_scale_alone_and_its_dtype(dtype):
    hidden = torch.randn(2, 5, 32, dtype=dtype, requires_grad=True)
    layer, scale = norm(hidden)
    output = fused.norm_forward(layer, scale, hidden)
    assert output.dtype == dtype
    saved = output.grad_fn.saved_tensors
    assert [tensor.shape for tensor in saved] == [hidden.shape, scale.shape]
    assert saved[0].data_ptr() == hidden.data_ptr()


def test_a_gated_mlp_and_its_gradients_are_transformers():
    torch.manual_seed(0)
    layer = Gemma3MLP(Gemma3TextConfig(hidden_size=16, intermediate_size=24))
    hidden = torch.randn(2, 5, 16)

    def gradients(forward):
        results = outputs_and_gradients(forward, hidden)
        results += [parameter.grad.clone() for parameter in layer.parameters()]
        layer.zero_grad()
        return results

    ours, theirs = gradients(lambda values: fused.mlp_forward(layer, values)), gradients(layer)
    assert len(ours) == 5
    for our, their in zip(ours, theirs, strict=True):
        assert torch.allclose(our, their, rtol=1e-5, atol=1e-6)
