"""The products of quantized layers beside bitsandbytes' own and beside plain ones, on a CPU."""

import bitsandbytes
import pytest
import torch

from tuner.model import quantized


def int8_layer(weight, threshold=6.0):
    outputs, inputs = weight.shape
    layer = bitsandbytes.nn.Linear8bitLt(
        inputs, outputs, bias=False, has_fp16_weights=False, threshold=threshold
    )
    layer.weight = bitsandbytes.nn.Int8Params(weight.clone(), requires_grad=False)
    return layer.to("cpu")


def nf4_layer(weight):
    outputs, inputs = weight.shape
    layer = bitsandbytes.nn.Linear4bit(inputs, outputs, bias=False, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
    return layer.to("cpu")


@pytest.fixture
def weight():
    torch.manual_seed(0)
    return torch.randn(96, 64)


def relative(value, expected):
    return ((value - expected).norm() / expected.norm()).item()


def test_a_4_bit_layers_products_are_those_of_its_dequantized_weight(weight):
    layer = nf4_layer(weight)
    plain = bitsandbytes.functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
    assert relative(plain, weight) < 0.15
    ours = quantized.NF4Linear(layer)
    inputs, gradient = torch.randn(5, 64), torch.randn(5, 96)
    assert relative(ours.forward(inputs), inputs @ plain.t()) < 1e-5
    assert relative(ours.backward(gradient), gradient @ plain) < 1e-5


def test_a_4_bit_layer_dequantized_once_multiplies_as_bitsandbytes_does(weight):
    layer = nf4_layer(weight).train()
    inputs, gradient = torch.randn(5, 64, requires_grad=True), torch.randn(5, 96)
    output = layer(inputs)
    output.backward(gradient)
    ours = quantized.DequantizedLinear(layer)
    assert torch.allclose(ours.forward(inputs.detach()), output, rtol=1e-5, atol=1e-5)
    assert torch.allclose(ours.backward(gradient), inputs.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("outliers", [0, 1, 3])
def test_an_8_bit_layer_keeps_the_columns_of_outliers_apart(weight, outliers):
    ordinary, gradient = torch.randn(5, 64).clamp(-4, 4), torch.randn(5, 96)
    large = torch.zeros(5, 64)
    large[torch.arange(outliers), 7 * torch.arange(outliers)] = 500.0
    ours = quantized.Int8Linear(int8_layer(weight))
    dequantized = ours.state.CB * ours.scale[:, None]
    assert relative(dequantized, weight) < 0.02
    output = ours.forward(ordinary + large)
    # Rounded in steps of 500 / 127, the ordinary values beside an outlier would be lost.
    assert relative(output - large @ dequantized.t(), ordinary @ dequantized.t()) < 0.02
    assert relative(ours.backward(gradient), gradient @ dequantized) < 1e-5
    assert relative(output, int8_layer(weight)(ordinary + large).detach()) < 0.02


def test_a_layers_inputs_are_left_as_they_were(weight):
    inputs = torch.randn(5, 64)
    inputs[0, 0] = 50.0
    before = inputs.clone()
    for layer in (quantized.Int8Linear(int8_layer(weight)), quantized.NF4Linear(nf4_layer(weight))):
        layer.forward(inputs)
        assert torch.equal(inputs, before)
