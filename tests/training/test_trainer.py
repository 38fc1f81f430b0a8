"""Steps and epochs: the learning rate, the step that is kept, a loss that ends the run."""

import math

import pytest
import torch

from tests.support.training import load_with_lora, recipe, train
from tuner.system.errors import UserError
from tuner.training import accumulation, evaluation, progress, trainer


def test_the_step_that_decides_most_rows_right_is_kept_then_the_lower_loss(
    tiny_text_model, tokenizer, examples, monkeypatch
):
    script = iter([(0.9, 1), (0.5, 3), (0.7, 3), (0.4, 3), (0.1, 2)])
    snapshots = []
    model = load_with_lora(tiny_text_model)

    def evaluate(self, _):
        snapshots.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
        loss, right = next(script)
        return evaluation.Evaluation(loss, decided=right, named=right, right=right, general=0)

    monkeypatch.setattr(evaluation.Evaluator, "evaluate", evaluate)
    data = trainer.TrainingData(tokenizer, examples, [True] * 70, list(range(20)), [20, 21])
    history = train(model, data, recipe(learning_rate=1e-2, epochs=5))
    assert history["kept_step"] == 8
    assert [e["step"] for e in history["evaluations"]] == [2, 4, 6, 8, 10]
    assert all(torch.equal(p, snapshots[3][n]) for n, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("better", "worse"),
    [  # loss, decided, named, right
        ((0.9, 3, 3, 3), (0.1, 7, 7, 2)),
        ((0.9, 5, 4, 2), (0.1, 7, 3, 2)),
        ((0.9, 5, 4, 2), (0.1, 4, 4, 2)),
        ((0.1, 5, 4, 2), (0.2, 5, 4, 2)),
    ],
)
def test_an_epoch_is_better_by_rows_right_then_by_names_then_by_call_or_text_then_by_loss(better, worse):
    better, worse = (evaluation.Evaluation(*numbers, general=1)._asdict() for numbers in (better, worse))
    assert progress.rank(better) < progress.rank(worse)
    assert progress.rank(better) == progress.rank({**better, "epoch": 3, "step": 12, "general": 0})


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
