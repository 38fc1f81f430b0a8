"""Adapters that are damaged or of another base are refused in one line, with the cure."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.tiny_models import write_tiny_adapter, write_tiny_model
from tuner.system.errors import UserError
from tuner.training import adapter_folder, adapter_weights


def edit_config(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(adapter, part, change):
    """Change the weights whose name holds `part`; those that become None are removed."""
    path = adapter / "adapter_model.safetensors"
    weights = {name: change(w) if part in name else w for name, w in load_file(path).items()}
    save_file({name: w for name, w in weights.items() if w is not None}, path)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def to_pickle(adapter):
    path = adapter / "adapter_model.safetensors"
    torch.save(load_file(path), adapter / "adapter_model.bin")
    path.unlink()


def without(adapter, name):
    (adapter / name).unlink()


CONFIG, WEIGHTS = "adapter_config.json", adapter_folder.WEIGHTS
UP, DOWN = "layers.1.mlp.up_proj.lora_B.weight", "layers.0.mlp.down_proj.lora_A.weight"
VALUE = "layers.1.self_attn.v_proj"
NESTED = "(a+)+" * 10 + "$"  # takes longer than the universe is old on a name of 40 letters a
DAMAGES = {
    "no folder": (shutil.rmtree, "does not exist; train an adapter first"),
    "no config": (lambda a: without(a, CONFIG), f"holds no adapter ({CONFIG} is missing)"),
    "config cut": (lambda a: truncate(a / CONFIG), f"{CONFIG} is damaged"),
    "config no object": (lambda a: (a / CONFIG).write_text("[1]"), f"{CONFIG} is damaged"),
    "unknown method": (lambda a: edit_config(a, peft_type="MAGIC"), "was made by the method MAGIC"),
    "names code": (
        lambda a: edit_config(a, megatron_config={"a": 1}, megatron_core="antigravity"),
        f"{CONFIG} has a megatron_config, which may run any code",
    ),
    "eight bits": (
        lambda a: edit_weights(a, UP, lambda w: w.to(torch.int8)),
        f"{UP} is I8 [128, 16], no matrix in F32",
    ),
    "64 bits": (lambda a: edit_weights(a, UP, lambda w: w.double()), f"{UP} is F64 [128, 16], no matrix"),
    "8-bit floats": (
        lambda a: edit_weights(a, UP, lambda w: w.to(torch.float8_e4m3fn)),
        f"{UP} is F8_E4M3 [128, 16]",
    ),
    "one dimension": (lambda a: edit_weights(a, UP, lambda w: w.flatten().clone()), f"{UP} is F32 [2048]"),
    "no dimension": (lambda a: edit_weights(a, UP, lambda w: w.sum()), f"{UP} is F32 []"),
    "empty": (lambda a: edit_weights(a, UP, lambda w: w[:0].clone()), f"{UP} is 0 wide"),
    "other width": (lambda a: edit_weights(a, UP, lambda w: w[:5].clone()), f"{UP} is 5 wide"),
    "a name that is no name": (
        lambda a: save_file({"\x1b[2Jevil\n": torch.ones(2, 2)}, a / WEIGHTS),
        "has no place for \ufffd[2Jevil ",
    ),
    "no base named": (lambda a: edit_config(a, base_model_name_or_path=None), "names no base model"),
    "no weights": (lambda a: without(a, WEIGHTS), f"holds no {WEIGHTS}"),
    "pickle": (to_pickle, "holds only a pickle, which is never read"),
    "empty file": (lambda a: (a / WEIGHTS).write_bytes(b""), f"{WEIGHTS} is damaged"),
    "cut file": (lambda a: truncate(a / WEIGHTS), f"{WEIGHTS} is damaged"),
    "wrong rank": (lambda a: edit_config(a, r=8), f"has rank 16, {CONFIG} says 8"),
    "zero B": (lambda a: edit_weights(a, UP, torch.zeros_like), f"{UP} is all zeros"),
    "not finite": (lambda a: edit_weights(a, DOWN, lambda w: w / 0), f"{DOWN} is not finite"),
    "missing module": (lambda a: edit_weights(a, VALUE, lambda w: None), f"{VALUE}.lora_A.weight and 1 more"),
    "other revision": (lambda a: (a / "run.json").write_text('{"revision": "2222"}'), "base (revision 2222"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_refused_in_one_line(adapter, tiny_text_model, tmp_path, damage):
    copy = tmp_path / "qlora_output"
    shutil.copytree(adapter, copy)
    damage_it, message = DAMAGES[damage]
    damage_it(copy)
    with pytest.raises(UserError) as error:
        adapter_weights.check_adapter(copy, tiny_text_model, "1111")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert "train again: python train_qlora.py" in str(error.value) or damage == "no folder"


def test_an_adapter_of_another_base_is_refused(adapter, tmp_path, tiny_text_model):
    adapter_weights.check_adapter(adapter, tiny_text_model, "1111")
    wide = write_tiny_model(tmp_path / "wide", hidden_size=96)
    with pytest.raises(
        UserError, match=r"was trained on another base: .*lora_[AB].weight is 64 wide, in .* 96"
    ):
        adapter_weights.check_adapter(adapter, wide, None)
    deep = write_tiny_adapter(tmp_path / "deep", write_tiny_model(tmp_path / "deep base", layers=3))
    with pytest.raises(UserError, match=r"was trained on another base: .* has no place for .*layers\.2\."):
        adapter_weights.check_adapter(deep, tiny_text_model, None)
