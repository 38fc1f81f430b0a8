"""What LoRA is put on, and what it leaves alone."""

import bitsandbytes
import pytest
import torch
from peft import PeftModel
from transformers import Gemma3ForConditionalGeneration

import train_qlora
from benchmarks import random_gemma_4b
from tests.support.training import add_lora, awaken, load_base, load_with_lora, recipe
from tuner.model import lora


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_frozen_and_lora_on_the_text_model_alone(tiny_model, bits):
    model = load_with_lora(tiny_model, bits)
    kind = {4: bitsandbytes.nn.Linear4bit, 8: bitsandbytes.nn.Linear8bitLt}[bits]
    with_lora = {name for name, module in model.named_modules() if hasattr(module, "lora_B")}
    assert len(with_lora) == 2 * 7
    assert not any("vision" in name for name in with_lora)
    assert all(isinstance(model.get_submodule(name).base_layer, kind) for name in with_lora)
    assert {n.rsplit(".", 1)[1] for n in with_lora} == set(train_qlora.RECIPE.target_modules)
    assert all(("lora_" in name) == p.requires_grad for name, p in model.named_parameters())
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    if bits == 4:
        state = model.get_submodule(min(with_lora)).base_layer.weight.quant_state
        assert (state.quant_type, state.nested) == ("nf4", True)
    else:
        assert model.get_submodule(min(with_lora)).base_layer.state.threshold == 6.0
    config = model.get_base_model().config
    assert config.get_text_config().use_cache is False


def test_without_the_vision_towers_layers_the_adapter_is_the_whole_models(tiny_model, tmp_path):
    models = [load_base(tiny_model, vision=v) for v in (True, False)]
    layers = [sum("vision" in name and ".layers." in name for name, _ in m.named_modules()) for m in models]
    if "multimodal" in str(tiny_model):
        assert layers[0] > 0
    assert layers[1] == 0
    adapters = [awaken(add_lora(model)) for model in models]
    configs = [adapter.peft_config["default"].to_dict() for adapter in adapters]
    assert configs[0] == configs[1]
    adapters[1].save_pretrained(tmp_path)
    whole = PeftModel.from_pretrained(load_base(tiny_model), tmp_path)
    found = {name: p for name, p in whole.named_parameters() if "lora_" in name}
    trained = {name: p for name, p in adapters[1].named_parameters() if "lora_" in name}
    assert list(found) == list(trained)
    assert all(torch.equal(found[name], p) for name, p in trained.items())


def test_the_trainable_line_is_ours_and_the_articles_is_explained():
    def count(**changes):
        with torch.device("meta"):
            model = Gemma3ForConditionalGeneration(random_gemma_4b.config())
        model = lora.add_lora(model, train_qlora.lora_config(recipe(**changes)))
        return model.get_nb_trainable_parameters()

    assert count() == (29_802_496, 4_300_079_472 + 29_802_496)
    trainable, everything = count(exclude_modules=None)
    assert (trainable, everything) == (32_788_480, 4_332_867_952)
    assert f"{100 * trainable / everything:.4f}" == "0.7567"
