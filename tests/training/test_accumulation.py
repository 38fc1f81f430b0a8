"""The gradient of a step: the same in micro-batches of any size, in one tensor, and where memory was full."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.support.training import CPU, add_gradient, awaken, load_with_lora, take_gradient
from tuner.data import batching
from tuner.system.errors import UserError
from tuner.training import accumulation, flat_weights, loss_functions


def test_weights_in_one_are_the_models_own_and_so_are_their_gradients(tiny_text_model, examples):
    apart, together = (awaken(load_with_lora(tiny_text_model)).eval() for _ in range(2))
    parameters = [p for p in together.parameters() if p.requires_grad]
    whole = flat_weights.flatten_parameters(parameters)
    assert whole.numel() == sum(p.numel() for p in parameters)
    for model in (apart, together):
        add_gradient(model, examples[:4])
    assert torch.equal(whole.grad, take_gradient(apart))
    copies = flat_weights.copy_to_cpu(dict(enumerate(parameters)), whole)
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        whole.add_(1)
    assert all(torch.equal(p, b + 1) for p, b in zip(parameters, before, strict=True))
    assert all(torch.equal(copies[i], b) for i, b in enumerate(before))


def test_a_micro_batch_is_as_large_as_its_tokens_allow(examples):
    sizes = {}
    for tokens in (100, 600, 10**6):
        batches = batching.group_padded(batching.shard(examples[:16], CPU), batching.length, tokens)
        for batch in batches:
            longest = max(len(e["input_ids"]) for e in batch)
            assert len(batch) == 1 or len(batch) * longest <= tokens
        assert sum(map(len, batches)) == 16
        sizes[tokens] = len(batches)
    assert sizes[100] == 16 > sizes[600] > sizes[10**6] == 1


def test_processes_share_a_step_out_among_them(examples):
    states = [SimpleNamespace(num_processes=4, process_index=rank) for rank in range(4)]
    shards = [batching.shard(examples[:15], state) for state in states]
    assert [len(shard) for shard in shards] == [4, 4, 4, 3]
    dealt = [tuple(e["input_ids"]) for shard in shards for e in shard]
    assert sorted(dealt) == sorted(tuple(e["input_ids"]) for e in examples[:15])
    assert batching.shard(examples[:1], states[1]) == []


def test_the_gradient_does_not_depend_on_the_micro_batch(tiny_model, examples, monkeypatch):
    model = awaken(load_with_lora(tiny_model)).eval()  # no dropout
    sixteen = sorted(examples, key=lambda e: len(e["input_ids"]))[-16:]
    # The mean over the step's trained tokens, worked out row by row in float64.
    total = sum(label != -100 for e in sixteen for label in e["labels"])
    want_loss, gradients = 0.0, {}
    for rows in (1, 4, 16):
        monkeypatch.setattr(
            batching, "group_padded", lambda e, *_, n=rows: [e[i : i + n] for i in range(0, 16, n)]
        )
        loss = add_gradient(model, sixteen).item()
        gradients[rows] = take_gradient(model)
        if not want_loss:
            for e in sixteen:
                ids, labels = torch.tensor([e["input_ids"]]), torch.tensor(e["labels"])
                with torch.no_grad():
                    logits = model(input_ids=ids, token_type_ids=torch.zeros_like(ids)).logits[0].double()
                want_loss += cross_entropy(logits[:-1], labels[1:], reduction="sum").item() / total
        assert loss == pytest.approx(want_loss, rel=1e-5)
    for rows in (4, 16):
        difference = (gradients[rows] - gradients[1]).norm() / gradients[1].norm()
        assert difference < 1e-5


def test_logits_in_chunks_and_checkpointing_give_the_same_gradient(tiny_model, examples, monkeypatch):
    model = awaken(load_with_lora(tiny_model)).eval()  # no dropout
    add_gradient(model, examples[:6])
    want = take_gradient(model)
    monkeypatch.setattr(loss_functions, "LOGITS_AT_ONCE", 7)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    loss_functions.checkpoint_layers(model)
    add_gradient(model, examples[:6])
    assert torch.allclose(take_gradient(model), want, rtol=1e-4, atol=1e-7)


def test_the_gradient_of_a_step_done_again_is_not_added_twice(tiny_text_model, examples, monkeypatch):
    eight = examples[:8]
    model = load_with_lora(tiny_text_model).eval()
    add_gradient(model, eight)
    want = take_gradient(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    weights = flat_weights.flatten_parameters(parameters)
    real, calls = loss_functions.loss_and_predictions, []

    def second_is_too_much(model, batch, *rest):
        calls.append(batch[0].shape)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(model, batch, *rest)

    monkeypatch.setattr(loss_functions, "loss_and_predictions", second_is_too_much)
    accumulator = accumulation.GradientAccumulator(model, weights, 0, CPU, tokens=400)
    accumulator.accumulate(eight, seed=1)
    assert len(calls) > 3
    assert accumulator.tokens < 400
    assert torch.allclose(torch.cat([p.grad.flatten() for p in parameters]), want, rtol=1e-4, atol=1e-8)


def test_the_budget_shrinks_to_a_part_of_the_largest_that_can_be_cut(capsys):
    """By 7/8 first, where a plan says what fits, then by more and more, down to a half."""
    attempts = []

    def work(tokens):
        attempts.append(tokens)
        if tokens > 500:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return "done"

    def sizes(tokens):
        return [(False, 900), (True, tokens)]

    assert accumulation.retry_on_oom(work, sizes, 1000, shrink=7 / 8) == ("done", 392)
    assert attempts == [1000, 875, 669, 392]  # × 7/8, × (7/8)², × (7/8)⁴
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "memory     GPU out of memory at 1000 tokens; retrying this step with 875"
    with pytest.raises(UserError, match=r"^GPU out of memory with one row of 900 tokens \(CUDA out"):
        accumulation.retry_on_oom(work, lambda tokens: [(False, 900)], 1000)
