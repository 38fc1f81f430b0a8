"""Layers in fewer kernels: the numbers and gradients of transformers' and PEFT's own."""

from functools import partial

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP, Gemma3RMSNorm

from tests.support.training import add_gradient, awaken, load_with_lora, shipped_examples, take_gradient
from tuner.model import cpu_layers, fused, quantized


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


@pytest.mark.parametrize("bits", [4, 8])
def test_lora_on_a_cpu_and_its_gradient_are_pefts(tiny_text_model, tokenizer, bits):
    model = awaken(load_with_lora(tiny_text_model, bits))
    for layer in model.modules():  # masks differ: each has its own way to draw them
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    examples = shipped_examples(tokenizer)[:6]
    losses, gradients = [], []
    for change in (lambda _: None, partial(fused.fuse_layers, cpu=True)):
        change(model.train())
        losses.append(add_gradient(model, examples).item())
        gradients.append(take_gradient(model))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4 if bits == 4 else 2e-2)
    error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert error < (1e-4 if bits == 4 else 5e-2)


def test_on_a_cpu_each_4_bit_layer_is_dequantized_once(tiny_text_model):
    model = load_with_lora(tiny_text_model)
    fused.fuse_layers(model, cpu=True)
    forwards = [layer.forward for layer in model.modules() if isinstance(layer, LoraLayer)]
    assert [forward.func for forward in forwards] == [fused.lora_forward] * 14
    assert all(isinstance(forward.args[1], quantized.DequantizedLinear) for forward in forwards)


def test_dropout_of_lora_on_a_cpu_is_felt_by_each_gradient(tiny_text_model):
    model = awaken(load_with_lora(tiny_text_model))
    fused.fuse_layers(model, cpu=True)
    layer = model.get_base_model().get_decoder().layers[0].mlp.gate_proj
    weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    inputs, scaling = torch.randn(1, 4, layer.in_features, requires_grad=True), layer.scaling["default"]
    gradient = torch.randn(1, 4, layer.out_features)

    def gradients(function):
        torch.manual_seed(5)
        output = function(inputs)
        return [output, *torch.autograd.grad(output, [inputs, *weights], gradient)]

    def plain(values):
        dropped = values * cpu_layers.random_mask(values.shape, 0.1) / 0.9
        return layer.base_layer(values) + scaling * dropped @ weights[0].t() @ weights[1].t()

    for ours, theirs in zip(gradients(layer.train()), gradients(plain), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    output = layer.eval()(inputs)
    assert torch.equal(output, layer(inputs))
