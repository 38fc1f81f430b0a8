"""The loss on a CPU: a part of the vocabulary at a time, and pads in nothing but the attention."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.support.training import awaken, load_with_lora
from tuner.training import collate, cpu_loss


@pytest.mark.parametrize("at_once", [1, 7, 50, 1000])
@pytest.mark.parametrize(
    "scale", [1, 100]
)  # logits of a hundred: exp overflows unless the highest is taken off
def test_the_streamed_loss_gradient_and_predictions_are_those_of_float64(monkeypatch, at_once, scale):
    monkeypatch.setattr(cpu_loss, "VOCABULARY_AT_ONCE", at_once)
    torch.manual_seed(0)
    hidden, head, targets = torch.randn(12, 16) * scale, torch.randn(50, 16), torch.randint(50, (12,))
    ours = hidden.clone().requires_grad_()
    loss, predictions = cpu_loss.StreamedCrossEntropy.apply(ours, head, targets)
    (loss / 3).backward()
    theirs = hidden.double().requires_grad_()
    logits = theirs @ head.double().t()
    want = cross_entropy(logits, targets, reduction="sum")
    (want / 3).backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert torch.allclose(ours.grad.double(), theirs.grad, atol=1e-4)
    assert torch.equal(predictions, logits.argmax(-1))
    with torch.no_grad():
        evaluated, same = cpu_loss.StreamedCrossEntropy.apply(hidden, head, targets)
    assert evaluated == loss
    assert torch.equal(same, predictions)


def test_the_gradient_leaves_out_what_is_negligible_for_every_token(monkeypatch):
    monkeypatch.setattr(cpu_loss, "VOCABULARY_AT_ONCE", 100)
    torch.manual_seed(0)
    hidden, head, targets = 2 * torch.randn(3, 16), torch.randn(1000, 16), torch.randint(1000, (3,))
    theirs = hidden.double().requires_grad_()
    logits = theirs @ head.double().t()
    cross_entropy(logits, targets, reduction="sum").backward()
    likely = (logits.softmax(-1) > cpu_loss.NEGLIGIBLE).any(0).sum().item()
    assert likely < 500, "else this test shows nothing"
    multiplied = []

    def product(inputs, weight):
        multiplied.append(inputs.shape[1])
        return inputs @ weight.t()

    monkeypatch.setattr(cpu_loss.cpu_layers, "product", product)
    ours = hidden.clone().requires_grad_()
    cpu_loss.StreamedCrossEntropy.apply(ours, head, targets)[0].backward()
    assert likely <= sum(multiplied) - 10 * 16 < 500
    assert (ours.grad - theirs.grad).norm() < 1e-2 * theirs.grad.norm()


def test_of_equal_logits_the_first_is_predicted_as_argmax_does(monkeypatch):
    monkeypatch.setattr(cpu_loss, "VOCABULARY_AT_ONCE", 2)
    head = torch.tensor([1.0, 3.0, 2.0, 3.0, 3.0])[:, None]
    _, predictions = cpu_loss.StreamedCrossEntropy.apply(torch.ones(1, 1), head, torch.tensor([0]))
    assert predictions.tolist() == [1]


def test_a_loss_that_is_not_finite_stays_so(monkeypatch):
    monkeypatch.setattr(cpu_loss, "VOCABULARY_AT_ONCE", 2)
    loss, _ = cpu_loss.StreamedCrossEntropy.apply(
        torch.full((1, 1), torch.nan), torch.ones(5, 1), torch.tensor([0])
    )
    assert loss.isnan()


def test_no_layer_computes_a_pad_and_each_token_is_as_in_the_padded_batch(tiny_text_model, examples):
    model = awaken(load_with_lora(tiny_text_model)).eval()
    few = sorted(examples, key=lambda e: len(e["input_ids"]))[::25]
    input_ids, mask, _ = collate.collate_padded(few, 0, "cpu")
    decoder = model.get_base_model().get_decoder()
    with torch.no_grad():
        want = decoder(input_ids=input_ids, attention_mask=mask).last_hidden_state[mask.bool()]
        widths = []
        layer = decoder.layers[0].mlp
        hook = layer.register_forward_hook(lambda _, inputs, __: widths.append(inputs[0].shape[:2]))
        ours = cpu_loss.hidden_states(model, input_ids, mask.bool())
        hook.remove()
    assert widths == [(1, mask.sum())]
    assert mask.sum() < mask.numel()
    assert torch.allclose(ours, want, rtol=1e-4, atol=1e-5)
    assert decoder.config._attn_implementation == "sdpa"  # as it was


def test_tokens_behind_the_last_trained_one_are_not_computed(tiny_text_model, examples):
    model = load_with_lora(tiny_text_model).eval()
    input_ids, mask, labels = collate.collate_padded(examples[:3], 0, "cpu")
    decoder, seen = model.get_base_model().get_decoder(), []
    hook = decoder.layers[0].mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[:2]))
    loss, _ = cpu_loss.loss_and_predictions(model, (input_ids, mask, labels))
    hook.remove()
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=mask).logits[:, :-1]
    want = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    # What predicts the last trained token is that before it, and a row ends with two more.
    last = [max(i for i, label in enumerate(row) if label != -100) for row in labels.tolist()]
    assert seen == [(1, sum(last))]
    assert sum(last) <= mask.sum() - 2 * 3
