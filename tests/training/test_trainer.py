"""Steps and epochs: the learning rate, what is kept, a loss that ends the run."""

import math

import pytest
import torch

from tests.support.training import load_with_lora, recipe, train
from tuner.system.errors import UserError
from tuner.training import accumulation, evaluation, trainer


def test_the_last_steps_adapter_is_kept_whatever_the_evaluations_were(
    tiny_text_model, tokenizer, examples, monkeypatch
):
    script = iter([(0.1, 3), (0.5, 3), (0.9, 1)])
    snapshots = []
    model = load_with_lora(tiny_text_model)

    def evaluate(self, _):
        snapshots.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
        loss, right = next(script)
        return evaluation.Evaluation(loss, decided=right, named=right, right=right, general=0)

    monkeypatch.setattr(evaluation.Evaluator, "evaluate", evaluate)
    data = trainer.TrainingData(tokenizer, examples, [True] * len(examples), list(range(20)), [20, 21])
    history = train(model, data, recipe(learning_rate=1e-2, epochs=3))
    assert [e["step"] for e in history["evaluations"]] == [2, 4, 6]
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, snapshots[-1][n]) for n, p in trained.items())
    assert not all(torch.equal(p, snapshots[0][n]) for n, p in trained.items())


@pytest.mark.parametrize(("count", "epochs", "warmup"), [(63, 10, 10), (63, 2, 2), (16, 3, 0)])
def test_the_warm_up_takes_ten_steps_and_never_more_than_a_quarter(
    tiny_text_model, tokenizer, examples, monkeypatch, count, epochs, warmup
):
    rates = []

    class Watched(torch.optim.SGD):
        def __init__(self, weights, lr, weight_decay):
            super().__init__(weights, lr=lr)

        def step(self, *args):
            rates.append(self.param_groups[0]["lr"])

    def accumulate(self, *_):
        self.weights.grad.fill_(1)
        return torch.tensor(1.0)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    monkeypatch.setattr(accumulation.GradientAccumulator, "accumulate", accumulate)
    data = trainer.TrainingData(tokenizer, examples, [True] * 70, list(range(count)), [])
    model = load_with_lora(tiny_text_model)
    history = train(model, data, recipe(learning_rate=2.0, epochs=epochs))
    steps = math.ceil(count / 16) * epochs
    assert history["warmup_steps"] == warmup
    assert history["steps"] == len(rates) == steps
    for step, rate in enumerate(rates):
        if step < warmup:
            want = 2.0 * step / warmup
        else:
            want = 1.0 + math.cos(math.pi * (step - warmup) / (steps - warmup))
        assert rate == pytest.approx(want)


def test_at_the_first_step_the_model_is_to_blame(tiny_text_model, tokenizer, examples, monkeypatch):
    monkeypatch.setattr(accumulation, "all_reduce_step", lambda *_: float("nan"))
    data = trainer.TrainingData(tokenizer, examples, [True] * 70, list(range(20)), [])
    with pytest.raises(UserError, match=r"^step 1: .* most likely the base model's weights are damaged: "):
        train(load_with_lora(tiny_text_model), data, recipe())
