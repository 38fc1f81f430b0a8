"""An adapter_config.json is of a plain LoRA or is refused in one line; PEFT gets nothing else of it."""

import json
import math
import time

import pytest

import train_qlora
from tuner.system.errors import UserError
from tuner.training import adapter_config, adapter_weights

ENDLESS = "(x+x+)+y" * 20  # catastrophic on any longer name
BROKEN = "("
NO_NUMBERS = (None, "16", True, [16], {"": 16}, math.nan, math.inf, -math.inf, 0, -1, 1e300, 10**400)
WRONG = {
    "peft_type": (None, "lora", "MAGIC", "XLORA", "ADALORA", ["LORA"], 3, "LORA\x1b[2J\n"),
    "task_type": ("SEQ_CLS", "SEQ_2_SEQ_LM", "MAGIC", 3, ["CAUSAL_LM"], True),
    "base_model_name_or_path": (None, "", 3, ["a"], {"a": 1}),
    "r": (*NO_NUMBERS, 16.0, 1e9, 10**9, 65_537),
    "lora_alpha": (*NO_NUMBERS, 1e7),
    "lora_dropout": ("0.1", True, [0.1], math.nan, math.inf, -0.1, 1, 1.0, 2),
    "use_rslora": (1, "true", [True]),
    "bias": ("all", "lora_only", 3, True),
    "init_lora_weights": ("pissa", "pissa_niter_4", "eva", "olora", "loftq", "corda", "lora_ga", 3, []),
    "target_modules": (
        *(None, "", [], {}, 3, [3], [["q_proj"]], "q_proj", "all-linear", r".*\.q_proj"),
        *([""], ["."], ["q_proj|k_proj"], ["q_proj."], [".*"], [" q_proj"], ["q_proj\n"], ["q" * 201]),
        *(BROKEN, [BROKEN], ENDLESS, [ENDLESS], [f"module{n}" for n in range(2001)], ["імʼя"]),
    ),
    "exclude_modules": ("vision_tower", ".*", BROKEN, ENDLESS, [ENDLESS], 3, {"a": 1}, [None]),
    "rank_pattern": ({"q_proj": 8}, {ENDLESS: 8}, [1], "x"),
    "alpha_pattern": ({"q_proj": 8}, {ENDLESS: 8}),
    "layers_pattern": ("layers", [ENDLESS]),
    "layers_to_transform": ([0], 1),
    "layer_replication": ([[0, 1000]],),
    "modules_to_save": (["lm_head"], [ENDLESS]),
    "target_parameters": ([ENDLESS], "x"),
    "trainable_token_indices": ([1], {ENDLESS: [1]}),
    "megatron_config": ({"a": 1},),
    "auto_mapping": ({"base_model_class": "Evil", "parent_library": "evil"},),
    "corda_config": ({"cache_file": "evil.pt"},),
    "lora_ga_config": ({"cache_file": "evil.pt"},),
    "eva_config": ({"rho": 2},),
    "loftq_config": ({"loftq_bits": 4},),
    "arrow_config": ({"task_adapter_names": ["someone/else"]},),
    "runtime_config": ({"ephemeral_gpu_offload": True},),
    "use_dora": (True, "x"),
    "use_qalora": (True,),
    "use_bdlora": ({"nblocks": 2},),
    "lora_bias": (True,),
    "fan_in_fan_out": (True,),
    "alora_invocation_tokens": ([1],),
    "ensure_weight_tying": (True,),
    "velora_config": ({"num_groups": 1},),
    "something_new": (True, "x", {"code": "evil"}),
    "evil\x1b[2J\nkey": (True,),
}
RUNS = ("megatron_config", "auto_mapping", "corda_config", "lora_ga_config")


@pytest.fixture(scope="module")
def config(adapter):
    return json.loads((adapter / "adapter_config.json").read_text())


@pytest.mark.parametrize("name", WRONG)
def test_what_is_more_than_a_plain_lora_is_refused_in_one_line(config, name):
    started = time.perf_counter()
    for value in WRONG[name]:
        with pytest.raises(UserError) as error:
            adapter_config.check("a", {**config, name: value})
        text = str(error.value)
        assert text.startswith("a")
        assert text.isprintable()
        assert len(text) < 250
        assert text.endswith("; train again: python train_qlora.py")
        assert ("may run any code" in text) == (name in RUNS)
    assert time.perf_counter() - started < 0.5


@pytest.mark.parametrize(
    "name", ["peft_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules"]
)
def test_what_a_lora_needs_may_not_be_missing(config, name):
    with pytest.raises(UserError, match="; train again"):
        adapter_config.check("a", {key: value for key, value in config.items() if key != name})


def test_what_other_plain_loras_have_is_taken(config):
    for changes in (
        {},
        {"exclude_modules": None},
        {"exclude_modules": ["vision_tower"]},
        {"target_modules": ["model.layers.0.self_attn.q_proj", "k_proj"], "lora_alpha": 0.5, "r": 1},
        {"lora_dropout": 0, "task_type": None, "init_lora_weights": "gaussian", "inference_mode": False},
        {"use_rslora": True, "revision": "main", "peft_version": "0.30.0", "something_new": None},
    ):
        adapter_config.check("a", {**config, **changes})
    few = {
        "peft_type": "LORA",
        "base_model_name_or_path": "b",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["v_proj"],
    }
    adapter_config.check("a", few)
    assert adapter_config.lora_settings(few)["lora_dropout"] == 0


def test_what_the_recipe_writes_is_taken_whole(adapter, config):
    assert train_qlora.RECIPE.exclude_modules == adapter_config.VISION_TOWER
    recipe = train_qlora.lora_config(train_qlora.RECIPE).to_dict()
    recipe |= {"target_modules": sorted(recipe["target_modules"]), "base_model_name_or_path": "b"}
    adapter_config.check("a", json.loads(json.dumps(recipe)))
    read = adapter_weights.read_lora(adapter).to_dict()
    read |= {"target_modules": sorted(read["target_modules"]), "peft_version": config["peft_version"]}
    assert json.loads(json.dumps(read)) == {**config, "target_modules": sorted(config["target_modules"])}


def test_the_scale_is_alpha_by_r_or_by_its_root():
    assert adapter_config.scale({"lora_alpha": 32, "r": 16}) == 2
    assert adapter_config.scale({"lora_alpha": 32, "r": 16, "use_rslora": True}) == 8
