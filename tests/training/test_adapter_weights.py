"""Adapters that are damaged or of another base are refused in one line, with the cure."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.tiny_models import write_tiny_adapter, write_tiny_model
from tuner.model import folders, hub, small_model
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
    "endless base": (lambda a: edit_config(a, base_model_name_or_path="a" * 5000), "names no base model"),
    "half a letter": (lambda a: edit_config(a, base_model_name_or_path="a\ud800"), "names no base model"),
    "a null": (lambda a: edit_config(a, base_model_name_or_path="a\0"), "names no base model"),
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


# -------------------------------------------------------------------------------------- finding the base


@pytest.fixture
def moved(adapter, tiny_text_model, tmp_path, monkeypatch):
    """An adapter in the working directory whose base is gone from where it was, and the path of a copy."""
    monkeypatch.chdir(tmp_path)
    copy = shutil.copytree(adapter, tmp_path / "out")
    edit_config(copy, base_model_name_or_path="/gone/tiny")
    base = shutil.copytree(tiny_text_model, tmp_path / "elsewhere" / "renamed")
    return copy, str(base)


def refused(adapter, base=None):
    """Return the one line in which the base of an adapter is refused."""
    with pytest.raises(UserError) as error:
        adapter_weights.find_base(adapter, base)
    assert "\n" not in str(error.value)
    return str(error.value)


def record_run(adapter, **run):
    (adapter / "run.json").write_text(json.dumps(run))


def test_a_base_that_moved_is_named_by_a_flag(moved):
    adapter, base = moved
    cure = "name the base's folder, or its name on the hub, with --base"
    assert refused(adapter) == f"/gone/tiny does not exist; the adapter in {adapter} needs it; {cure}"
    found = adapter_weights.find_base(adapter, base)
    assert (found.folder, found.name) == (base, base)
    assert refused(adapter, "./none") == f"./none does not exist; the adapter in {adapter} needs it; {cure}"


def test_a_base_that_moved_along_with_the_adapter_is_found(moved):
    adapter, base = moved
    shutil.copytree(base, adapter.parent / "tiny")
    assert adapter_weights.find_base(adapter).folder == str(adapter.parent / "tiny")


def test_the_hub_is_not_asked_for_what_was_a_folder(moved, monkeypatch):
    adapter, _ = moved
    monkeypatch.setattr(hub, "fetch", lambda *_: pytest.fail("asked"))
    for name in ("tiny", "./tiny", "a/b/tiny", "models/tiny"):
        edit_config(adapter, base_model_name_or_path=name)
        record_run(adapter, revision=None, model=name)
        assert refused(adapter).startswith(f"{name} does not exist; the adapter in ")


def test_of_a_base_on_the_hub_the_version_is_fetched_that_was_trained_on(moved, monkeypatch):
    adapter, base = moved
    commit, asked = "0123456789" * 4, []

    def fetch(*arguments):
        asked.append(arguments)
        if len(asked) > 1:
            raise UserError("google/tiny: hub unreachable", "hub")
        return shutil.copytree(base, f"models--google--tiny/snapshots/{commit}")

    monkeypatch.setattr(hub, "fetch", fetch)
    record_run(adapter, revision=commit)
    found = adapter_weights.find_base(adapter, "google/tiny")
    assert (found.name, found.revision) == ("google/tiny", commit)
    record_run(adapter, revision="main; --upload")
    says = refused(adapter, "google/tiny")
    assert says.startswith("google/tiny: hub unreachable; or name the base's folder")
    assert asked == [("google/tiny", commit), ("google/tiny", None)]


def test_another_base_of_the_same_shape_is_refused(moved, tiny_text_model):
    adapter, base = moved
    record_run(adapter, revision=None, model_sha256=folders.weights_fingerprint(tiny_text_model))
    adapter_weights.find_base(adapter, base)
    folders.write_origin(base, "1111", "google/tiny")
    adapter_weights.find_base(adapter, base)  # the weights are the same
    path = Path(base, "model.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert refused(adapter, base) == (
        f"{adapter} was trained on another base (its weights are not those in {base}); name the base's "
        "folder, or its name on the hub, with --base, or train again: python train_qlora.py"
    )
    record_run(adapter, revision="2222")
    assert "was trained on another base (revision 2222, " in refused(adapter, base)


def test_the_small_base_is_built_again_here(moved, monkeypatch):
    adapter, base = moved
    monkeypatch.setattr(small_model, "build_small", lambda folder: shutil.copytree(base, folder))
    edit_config(adapter, base_model_name_or_path="/gone/gemma-3-270m")
    record_run(adapter, revision=None)
    assert adapter_weights.find_base(adapter).folder == "gemma-3-270m"
    assert Path("gemma-3-270m/config.json").is_file()
