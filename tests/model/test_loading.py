"""The base as it is loaded: quantized, whole, and with the vision tower's layers or without them."""

import shutil

import bitsandbytes.nn.modules as layers
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import random_gemma_4b
from tests.support.tiny_models import tiny_config
from tests.support.training import add_lora, load_base, load_with_lora
from tuner.system.errors import UserError


def test_the_embedding_is_not_cast(tiny_model):
    model = add_lora(load_base(tiny_model, 4, torch.bfloat16))
    assert model.get_base_model().get_input_embeddings().weight.dtype == torch.bfloat16


def test_the_random_model_of_the_benchmarks_is_whole_and_tied(tiny_text_model, tmp_path):
    folder = tmp_path / "random"
    random_gemma_4b.write(folder, tiny_text_model, "cpu", tiny_config(multimodal=True))
    names = load_file(folder / "model.safetensors")
    assert not any("lm_head" in name for name in names)
    assert all(tensor.dtype == torch.bfloat16 for tensor in names.values())
    model = load_base(str(folder))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_checkpoint_that_lacks_weights_is_refused(tiny_text_model, tmp_path):
    folder = shutil.copytree(tiny_text_model, tmp_path / "cut")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights \(model.layers.1.mlp.up_proj.weight"):
        load_with_lora(str(folder))


def test_no_linear_layer_repacks_its_weights_on_a_cpu(tiny_text_model, monkeypatch):
    """The trap itself needs AVX512-BF16; here every layer is told that the CPU has it."""
    monkeypatch.setattr(layers, "has_avx512bf16", lambda: True)
    model = load_with_lora(tiny_text_model)
    flags = [m.support_avx512bf16_for_cpu for m in model.modules() if isinstance(m, layers.Linear4bit)]
    assert flags == [False] * 14
