"""The memory that training takes, as it is worked out: near what was measured, and never over the budget."""

import itertools
import json
import math

import pytest
import torch
from transformers import Gemma3ForCausalLM

from benchmarks import random_gemma_4b
from tests.support.tiny_models import tiny_config
from train_qlora import RECIPE
from tuner.training import memory_plan


def test_dimensions_and_weights_are_the_models_own(tmp_path):
    config = random_gemma_4b.config()
    config.save_pretrained(tmp_path)
    dims = memory_plan.read_dimensions(json.loads((tmp_path / "config.json").read_text()))
    assert dims == memory_plan.GEMMA_3_4B
    assert memory_plan.lora_weights(dims, RECIPE.lora_r) == 29_802_496
    weights = memory_plan.text_weights(dims) + memory_plan.plain_weights(dims)
    with torch.device("meta"):
        model = Gemma3ForCausalLM(config.text_config)
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert weights == sum(p.numel() for p in model.parameters()) - norms
    tiny_config(multimodal=False).save_pretrained(tmp_path)
    dims = memory_plan.read_dimensions(json.loads((tmp_path / "config.json").read_text()))
    assert (dims.layers, dims.queries, dims.keys) == (2, 64, 32)


# Random weights of the 4B dimensions, H100, torch 2.11, bitsandbytes 0.50.2. Allocated GiB of single
# micro-batches of so many tokens, layers checkpointed; the vision tower, which was loaded then, taken off.
CHECKPOINTED = [(4, 1024, 3.525), (4, 2046, 3.742), (8, 1024, 4.989), (8, 2046, 5.232)]
# Reserved GiB with graphs of so many tokens, of which so many are trained.
GRAPHS = [(4, 600, 128, 6.547), (4, 264, 128, 4.932), (4, 128, 64, 4.092), (4, 64, 36, 3.684)]
GRAPHS += [(8, 600, 128, 8.162), (8, 264, 128, 6.439), (8, 128, 64, 5.586), (8, 64, 36, 5.203)]


@pytest.mark.parametrize(("bits", "tokens", "measured"), CHECKPOINTED)
def test_the_memory_estimate_is_near_what_was_measured(bits, tokens, measured):
    estimate = memory_plan.peak_bytes(memory_plan.GEMMA_3_4B, bits, 16, tokens, 128) / 2**30
    assert math.isclose(estimate, measured, rel_tol=0.05)


@pytest.mark.parametrize(("bits", "tokens", "trained", "measured"), GRAPHS)
def test_a_plan_takes_what_it_may_and_no_more(bits, tokens, trained, measured):
    def planned(gib):
        return memory_plan.make_plans(memory_plan.GEMMA_3_4B, bits, 16, gib * 2**30, trained, 9)[0].tokens

    assert planned(measured) <= tokens
    assert planned(1.15 * measured) > tokens


def test_a_row_that_no_graph_takes_has_its_memory_beside_the_graphs():
    dims = memory_plan.GEMMA_3_4B
    for bits, gib in itertools.product((4, 8), range(3, 40)):
        least = memory_plan.least_bytes(dims, bits, 16, 2000, 128)
        for budget in (gib * 2**30, gib * 2**30 + 2**29):
            plans = memory_plan.make_plans(dims, bits, 16, budget, 128, 2000)
            assert (max(plans[0][:2]) >= 2000) == (budget >= least)
            for plan in plans[1:]:
                assert 0 == plans[0].tokens < plan.tokens < plan.checkpointed == 2000 <= plans[0].checkpointed
                widths = memory_plan.ACTIVATION_WIDTHS[bits] * (dims.hidden + dims.intermediate)
                kept = 2 * widths * dims.layers
                logits = memory_plan.BYTES_A_KEPT_LOGIT * dims.vocabulary * min(128, plan.tokens)
                assert least + plan.tokens * kept + logits <= budget
