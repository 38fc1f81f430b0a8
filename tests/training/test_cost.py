"""The seconds of a run on the usual GPUs, and which of them it fits, are near what was measured."""

import pytest

from train_qlora import RECIPE
from tuner.training import cost
from tuner.training.memory_plan import GEMMA_3_4B, Workload


def test_the_base_that_is_reckoned_with_is_the_one_that_is_here(tiny_text_model, tmp_path):
    assert cost.dimensions_of(tiny_text_model).layers == 2
    assert cost.dimensions_of("google/gemma-3-4b-it") == cost.dimensions_of(tmp_path) == GEMMA_3_4B


def test_the_time_is_near_what_was_measured_and_grows_with_the_rows_and_on_smaller_cards():
    workload = Workload([[38] * 16] * 4, longest=49, trained=1041, total=2417)

    def seconds(bits, card, **other):
        return cost.run_seconds(GEMMA_3_4B, workload._replace(**other), bits, card, RECIPE)

    assert seconds(4, "H100") == pytest.approx(28.7, rel=0.1)  # whole commands, 40 steps
    assert seconds(8, "H100") == pytest.approx((33.4 + 44.0) / 2, rel=0.1)  # on two hosts
    thousands = {"steps": [list(range(20, 660, 40))] * 282, "longest": 2000}
    epoch = (seconds(4, "H100", **thousands) - seconds(4, "H100", steps=[], longest=2000)) / 10
    assert epoch == pytest.approx(134, rel=0.15)  # 282 steps of rows of 320 tokens in the mean, measured
    more = seconds(4, "H100", steps=[[38] * 16] * 40)
    assert 10 < more - seconds(4, "H100") < 60
    assert seconds(4, "T4") > seconds(4, "RTX 3090") > seconds(4, "L4") > seconds(4, "H100")
    long = {"steps": [[2000] * 16] * 4, "longest": 2000}
    assert seconds(4, "RTX 4090", **long) > seconds(4, "H100", **long) > 1.5 * seconds(4, "H100")
