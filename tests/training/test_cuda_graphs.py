"""Packed rows, their loss and the layers that keep less: the same numbers as the plain way, on a CPU."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from tests.support.training import CPU, add_gradient, awaken, load_with_lora, take_gradient
from tuner.data import batching
from tuner.model import attention, fused
from tuner.training import collate, cuda_graphs, flat_weights, loss_functions, memory_plan


def row(tokens, trained=1):
    return {"input_ids": list(range(tokens)), "labels": [-100] * (tokens - trained) + [7] * trained}


def test_packs_hold_every_row_once_and_no_more_than_they_may():
    rows = [row(n) for n in (50, 7, 20, 30, 31, 90, 10, 49)]
    packs = batching.group_packed(sorted(rows, key=batching.length, reverse=True), 100)
    assert sorted(id(r) for pack in packs for r in pack) == sorted(map(id, rows))
    sizes = [batching.total_tokens(pack) for pack in packs]
    assert max(sizes) <= 100
    assert len(packs) == 3  # 287 tokens: fewer cannot be
    assert [len(pack) for pack in batching.group_packed([row(300), row(5)], 100)] == [1, 1]


@pytest.mark.parametrize("sizes", [[520, 540, 560, 600], [49, 40, 30, 56], list(range(20, 2000, 30)), [5]])
def test_few_lengths_and_more_where_a_long_run_makes_up_for_their_capture(sizes):
    def padding(sizes, lengths):
        return sum(min(n for n in lengths if n >= size) - size for size in sizes)

    for times in (1, 10, 10_000):
        lengths = cuda_graphs.choose_length_buckets(sizes * times)
        assert lengths == sorted(set(lengths))
        assert all(length % 8 == 0 for length in lengths)
        assert max(sizes) <= lengths[-1] < max(sizes) + 8 + max(sizes) / 8
        assert len(lengths) <= 16
        for length in lengths[:-1]:
            saved = padding(sizes, [n for n in lengths if n != length]) - padding(sizes, lengths)
            assert saved * times >= cuda_graphs.CAPTURE_COST_TOKENS
    assert len(cuda_graphs.choose_length_buckets(sizes[-5:])) == 1
    finest = sum(-size % 8 for size in sizes)
    assert padding(sizes, lengths) <= max(0.1 * sum(sizes), finest + 8 * len(sizes))


@pytest.mark.parametrize(
    ("bits", "tokens", "short"),
    [(4, 4096, 1024), (4, 400, 1024), (4, 400, 100), (4, 160, 1024), (8, 400, 1024), (8, 400, 100)],
)
def test_the_gradient_of_packed_rows_is_that_of_padded_ones(
    tiny_model, examples, monkeypatch, bits, tokens, short
):
    monkeypatch.setattr(attention, "MAX_EXPLICIT_ATTENTION", short)
    examples = [example for example in examples if batching.length(example) <= tokens][:16]
    model = awaken(load_with_lora(tiny_model, bits)).eval()  # no dropout
    want_loss = add_gradient(model, examples).item()
    want = take_gradient(model)
    total = batching.trained_tokens(examples)
    fused.fuse_layers(model)
    attend, attended = transformers.AttentionInterface()[attention.PACKED_ATTENTION], []
    transformers.AttentionInterface.register(
        attention.PACKED_ATTENTION, lambda *args, **settings: attended.append(1) or attend(*args, **settings)
    )
    loss = 0.0
    for pack in memory_plan.split_packs(examples, tokens, CPU)[0]:
        length = 8 * -(-batching.total_tokens(pack) // 8) + 8  # some padding
        batch = collate.collate_packed(pack, length, batching.trained_tokens(pack) + 3, 0)
        pack_loss = loss_functions.packed_loss(model, batch, 100) / total
        pack_loss.backward()
        loss += pack_loss.item()
    assert loss == pytest.approx(want_loss, rel=1e-5)
    assert bool(attended) == (tokens <= short)
    near = {4: 1e-5, 8: 1e-3 if attended else 1e-4}  # roundings to int8, more of them with other attention
    assert (take_gradient(model) - want).norm() / want.norm() < near[bits]
    assert model.get_base_model().get_decoder().config._attn_implementation == "sdpa"  # as it was


@pytest.mark.parametrize("bits", [4, 8])
def test_the_gradient_with_dropout_is_how_the_loss_changes(tiny_text_model, examples, bits):
    model = awaken(load_with_lora(tiny_text_model, bits)).train()
    fused.fuse_layers(model)
    weights = flat_weights.flatten_parameters([p for p in model.parameters() if p.requires_grad])
    batch = collate.collate_packed(examples[:4], 8 * -(-batching.total_tokens(examples[:4]) // 8), 80, 0)

    def loss():
        torch.manual_seed(5)
        return loss_functions.packed_loss(model, batch, 100)

    loss().backward()
    way = weights.grad / weights.grad.norm()
    with torch.no_grad():
        weights.add_(0.02 * way)
        higher = loss()
        weights.sub_(0.04 * way)
        lower = loss()
    assert ((higher - lower) / 0.04).item() == pytest.approx(weights.grad.norm().item(), rel=0.02)
    torch.manual_seed(6)
    other = loss_functions.packed_loss(model, batch, 100)
    assert other.item() != pytest.approx(lower.item(), rel=1e-6)  # it is dropped out by chance


def test_attention_and_its_gradients_are_torchs():
    attention.register_packed_attention()
    attend = transformers.AttentionInterface()[attention.PACKED_ATTENTION]
    torch.manual_seed(0)
    inputs = [torch.randn(1, n, 24, 16, requires_grad=True) for n in (6, 2, 2)]
    mask = torch.zeros(1, 1, 24, 24).masked_fill_(torch.ones(24, 24).triu(1).bool(), torch.finfo().min)
    ours, _ = attend(None, *inputs, mask, scaling=0.3, dropout=0.0)
    theirs = scaled_dot_product_attention(*inputs, attn_mask=mask, scale=0.3, enable_gqa=True).transpose(1, 2)
    weights = torch.randn(ours.shape)
    gradients = [torch.autograd.grad((result * weights).sum(), inputs) for result in (ours, theirs)]
    for one, other in zip((ours, *gradients[0]), (theirs, *gradients[1]), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


def test_cross_entropy_and_its_gradient_are_torchs():
    torch.manual_seed(0)
    hidden, head = torch.randn(23, 16, requires_grad=True), torch.randn(50, 16)
    targets = torch.randint(50, (23,))
    targets[[3, 9]] = -100
    want = cross_entropy(hidden @ head.t(), targets, reduction="sum") * 0.3
    want.backward()
    wanted, hidden.grad = hidden.grad, None
    loss = loss_functions.FusedCrossEntropy.apply(hidden, head, targets, 10) * 0.3
    loss.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    assert torch.allclose(hidden.grad, wanted, atol=1e-6)


def test_long_rows_and_other_processes_rows(examples):
    state = SimpleNamespace(device=torch.device("cpu"), num_processes=2, process_index=0)
    both, examples = [], examples[:16]
    for process in (0, 1):
        state.process_index = process
        packs, long = memory_plan.split_packs(examples, 100, state)
        assert all(len(e["input_ids"]) > 100 for e in long)
        assert all(batching.total_tokens(pack) <= 100 for pack in packs)
        both += [e for pack in packs for e in pack] + long
    assert sorted(map(id, both)) == sorted(map(id, examples))


def test_the_quickest_plan_is_that_of_the_fewest_launches():
    dims = memory_plan.GEMMA_3_4B

    def planned(gib, steps, bits=4):
        plans = memory_plan.make_plans(dims, bits, 16, gib * 2**30, 128, max(map(max, steps)))
        return memory_plan.quickest_plan(plans, steps, bits, CPU)

    mixed = [list(range(60, 200, 9))] * 4
    assert planned(20, mixed).tokens > 199
    for gib in (4.0, 4.1, 4.5, 4.9):  # graphs beside which each longer row would go alone
        assert planned(gib, mixed).tokens == 0
    seconds = [memory_plan.plan_seconds(planned(gib / 50, mixed), mixed, 4, CPU) for gib in range(180, 500)]
    assert seconds == sorted(seconds, reverse=True)  # more memory, never slower
    assert 0 < planned(4.7, [[30] * 16] * 9 + [[30] * 15 + [220]]).tokens < 220  # one long row
