"""Held-out rows: their loss, what is decided rightly, and that training is as it was after them."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.support.training import CPU, add_gradient, awaken, load_with_lora, memory_for, take_gradient
from tuner.system.errors import UserError
from tuner.training import collate, loss_functions
from tuner.training.evaluation import Evaluator


def evaluator(model, tokenizer, examples, is_call, **options):
    examples = [{**e, "is_call": call} for e, call in zip(examples, is_call, strict=True)]
    return Evaluator(model, examples, tokenizer, CPU, **options)


def test_loss_and_predictions_are_those_of_the_whole_models_logits(tiny_model, examples):
    model = awaken(load_with_lora(tiny_model)).eval()
    ids, mask, labels = collate.collate_padded(examples[:5], 0, "cpu")
    with torch.no_grad():
        loss, predictions = loss_functions.loss_and_predictions(model, (ids, mask, labels))
        logits = model(input_ids=ids, attention_mask=mask, token_type_ids=torch.zeros_like(ids)).logits
    want = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert predictions.tolist() == logits[:, :-1].argmax(-1)[labels[:, 1:] != -100].tolist()


@pytest.mark.parametrize("bits", [4, 8])
def test_an_evaluation_changes_nothing_about_the_training_after_it(tiny_model, tokenizer, examples, bits):
    model = awaken(load_with_lora(tiny_model, bits)).train()
    held_out = evaluator(model, tokenizer, examples[8:16], [True, False] * 4)

    def step():
        torch.manual_seed(3)
        add_gradient(model, examples[:8])
        return take_gradient(model)

    before = step()
    first = held_out.evaluate()
    assert model.training
    assert torch.equal(step(), before)
    assert held_out.evaluate() == first


def test_an_evaluation_does_without_the_attention_that_is_compiled_for_each_shape(
    tiny_text_model, tokenizer, examples, monkeypatch
):
    real, allowed = loss_functions.loss_and_predictions, []

    def loss_and_predictions(*args):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return real(*args)

    monkeypatch.setattr(loss_functions, "loss_and_predictions", loss_and_predictions)
    evaluator(load_with_lora(tiny_text_model), tokenizer, examples[:4], [True, False] * 2).evaluate()
    assert allowed == [False]
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_an_evaluation_that_runs_out_of_memory_is_done_again_and_leaves_dropout_on(
    tiny_text_model, tokenizer, examples, monkeypatch, capsys
):
    model = awaken(load_with_lora(tiny_text_model)).train()
    held_out = evaluator(model, tokenizer, examples[:4], [True, False] * 2)
    want = held_out.evaluate()
    longest = max(len(e["input_ids"]) for e in examples[:4])
    with memory_for(monkeypatch, 2 * longest):
        evaluation = held_out.evaluate()
    assert evaluation.right == want.right
    assert evaluation.loss == pytest.approx(want.loss, rel=1e-5)
    assert held_out.tokens <= 2 * longest
    assert all(module.training for module in model.modules())
    assert "memory     GPU out of memory at" in capsys.readouterr().out
    with memory_for(monkeypatch, 10), pytest.raises(UserError, match="out of memory with one row of"):
        held_out.evaluate()
    assert all(module.training for module in model.modules())


def test_an_evaluation_that_is_to_stop_says_nothing_and_leaves_dropout_on(
    tiny_text_model, tokenizer, examples
):
    model = load_with_lora(tiny_text_model).train()
    assert evaluator(model, tokenizer, examples[:4], [True, False] * 2).evaluate(stop_request=True) is None
    assert all(module.training for module in model.modules())


def test_rows_decided_right_are_counted_as_a_reader_would(tokenizer, monkeypatch):
    call = tokenizer("<tool_call", add_special_tokens=False)["input_ids"][0]
    hello = call + 1
    rows = [  # label, prediction for each position after the first
        ([-100, call, 51, 106, -100], [0, call, 51, 106, 0], True, True),
        ([-100, call, 51, 106, -100], [0, call, 51, 107, 0], True, False),  # the call does not end
        ([-100, hello, 61, 106, -100], [0, hello, 9, 9, 0], False, True),
        ([-100, hello, 61, 106, -100], [0, call, 61, 106, 0], False, False),
        ([70, 106, -100, call, 106], [9, 9, 0, call, 106], True, True),  # only the last turn decides
        ([call, 106, -100, hello, 106], [call, 106, 0, 7, 7], False, True),
    ]
    examples = [
        {"input_ids": [1] * 6, "attention_mask": [1] * 6, "labels": [-100, *labels]} for labels, *_ in rows
    ]

    def fake(model, batch, at_once):
        labels = batch[2]
        flat = [
            prediction
            for row_labels, predictions, *_ in rows
            for prediction, label in zip(predictions, row_labels, strict=True)
            if label != -100
        ]
        assert len(flat) == int((labels[:, 1:] != -100).sum())
        return torch.tensor(12.0), torch.tensor(flat)

    monkeypatch.setattr(loss_functions, "loss_and_predictions", fake)
    model = torch.nn.Linear(1, 1)
    loss, right = evaluator(model, tokenizer, examples, [row[2] for row in rows]).evaluate()
    assert right == sum(row[3] for row in rows)
    assert loss == pytest.approx(12.0 / sum(label != -100 for labels, *_ in rows for label in labels))
