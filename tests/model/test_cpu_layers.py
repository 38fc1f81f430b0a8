"""The layers of training on a CPU: products, dropout and attention are those of torch."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tuner.model import cpu_layers


@pytest.mark.parametrize("onednn", [cpu_layers.ONEDNN, False])
def test_a_product_is_that_of_float64_with_a_transposed_weight_and_strided_inputs_too(monkeypatch, onednn):
    monkeypatch.setattr(cpu_layers, "ONEDNN", onednn)
    torch.manual_seed(0)
    inputs, weight = torch.randn(2, 5, 24), torch.randn(8, 24)
    strided = torch.randn(24, 5, 2).permute(2, 1, 0)
    for a, b in ((inputs, weight), (inputs, weight.t().contiguous().t()), (strided, weight)):
        assert torch.allclose(cpu_layers.product(a, b).double(), a.double() @ b.double().t(), atol=1e-5)


def test_a_mask_drops_its_share_of_elements_each_by_itself():
    torch.manual_seed(0)
    mask = cpu_layers.random_mask(torch.Size((1001, 999)), 0.1)
    assert mask.dtype == torch.bool
    dropped = (~mask).double()
    assert dropped.mean() == pytest.approx(0.1, abs=0.0015)  # five standard deviations
    for shift in (1, 2, 3, 4, 999):  # four elements come of one random number
        both = dropped.flatten()[shift:] * dropped.flatten()[:-shift]
        assert both.mean() == pytest.approx(0.01, abs=0.0006)
    for axis in (0, 1):
        assert dropped.mean(axis).min() > 0.03


def test_dropout_scales_what_it_keeps_and_repeats_with_its_seed():
    inputs = torch.randn(7, 9)
    torch.manual_seed(3)
    output, mask = cpu_layers.dropout(inputs, 0.1)
    assert 0 < mask.sum() < 63
    assert torch.allclose(output, inputs * mask / 0.9)
    assert not torch.equal(cpu_layers.dropout(inputs, 0.1)[0], output)
    torch.manual_seed(3)
    assert torch.equal(cpu_layers.dropout(inputs, 0.1)[0], output)


def test_rows_end_to_end_attend_as_each_does_alone():
    lengths, heads, window = (9, 4, 1), 4, 3
    torch.manual_seed(0)
    states = [torch.randn(1, n, sum(lengths), 8, requires_grad=True) for n in (heads, 1, 1)]
    positions = torch.arange(max(lengths))
    present = positions < torch.tensor(lengths)[:, None]
    distance = positions[:, None] - positions
    visible = present[:, None] & (distance >= 0) & (distance < window)
    mask = torch.zeros(visible.shape).masked_fill_(~visible, torch.finfo(torch.float32).min)[:, None]
    output, _ = cpu_layers.attend_unpadded(None, *states, mask, 0.3)
    alone = []
    for row in zip(*(tensor.split(lengths, 2) for tensor in states), strict=True):
        queries, keys, values = row[0], *(tensor.expand(1, heads, -1, 8) for tensor in row[1:])
        near = visible[0, : queries.shape[2], : queries.shape[2]]
        alone.append(scaled_dot_product_attention(queries, keys, values, attn_mask=near, scale=0.3))
    want = torch.cat(alone, 2).transpose(1, 2)
    assert output.shape == want.shape == (1, sum(lengths), heads, 8)
    assert torch.allclose(output, want, atol=1e-6)
    weights = torch.randn(want.shape)
    for ours, theirs in zip(
        *(torch.autograd.grad((o * weights).sum(), states) for o in (output, want)), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-5)
