"""Whatever a base is saved as, what trains on it merges: each form of files, and what is proved of it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge
from tests.support.rows import row
from tests.support.scripts import run_main
from tests.support.tiny_models import write_tiny_adapter, write_tiny_model
from tests.support.training import run_training
from tuner.inference import probes
from tuner.model import gemma_folder
from tuner.system.errors import UserError
from tuner.training import merge_proof, merging


@pytest.fixture(autouse=True)
def one_probe(monkeypatch, tmp_path_factory):
    probe = tmp_path_factory.mktemp("probes") / "one.json"
    probe.write_text(json.dumps(row("Привет!", "Да.")))
    monkeypatch.setattr(merge, "PROBES", str(probe))
    monkeypatch.setattr(probes, "MAX_NEW_TOKENS", 4)


@pytest.fixture(scope="module")
def bases(tiny_text_model, adapter, tmp_path_factory):
    """{class: (base, adapter)}."""
    folder = tmp_path_factory.mktemp("multimodal")
    base = write_tiny_model(folder / "base", multimodal=True)
    return {"text": (tiny_text_model, adapter), "multimodal": (base, write_tiny_adapter(folder / "a", base))}


def finer(weight):
    """Return a bf16 weight in fp32 with digits that bf16 has not."""
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    return weight.float() * (1 + 1e-3 * noise)


def embedding(weights):
    return next(w for name, w in weights.items() if "embed_tokens" in name)


def renamed(weights):
    """Return weights by the names that transformers gave them in 2025."""
    return {
        name
        if name.startswith("vision")
        else name.replace("language_model.model.", "model.language_model."): w
        for name, w in weights.items()
    }


FORMS = {
    "fp32": (lambda w: {name: finer(t) for name, t in w.items()}, ["F32"]),
    "fp16": (lambda w: {name: finer(t).half() for name, t in w.items()}, ["F16"]),
    "fp32 norms": (lambda w: {n: finer(t) if "norm" in n else t for n, t in w.items()}, ["F32"]),
    "all three": (
        lambda w: {
            n: finer(t).half() if "mlp" in n else finer(t) if "norm" in n else t for n, t in w.items()
        },
        ["F16", "F32"],
    ),
    "a copy of the embedding": (lambda w: {**w, "lm_head.weight": embedding(w).clone()}, []),
    "an fp32 copy of the embedding": (
        lambda w: {**{n: finer(t) for n, t in w.items()}, "lm_head.weight": finer(embedding(w))},
        ["F32"],
    ),
    "a head of its own": (lambda w: {**w, "lm_head.weight": finer(embedding(w)).bfloat16()}, []),
    "other names": (renamed, []),
    "no prefix": (lambda w: {name.removeprefix("model."): t for name, t in w.items()}, []),
}


BOTH = [("multimodal", "fp32"), ("multimodal", "other names")]


def tail(name):
    for prefix in ("base_model.model.", "language_model.model.", "model.language_model.", "model."):
        name = name.removeprefix(prefix)
    return name.removeprefix("language_model.")


def save_as(folder, form):
    """Change the weights of a base's folder to a form; return (weights, dtypes beside bf16)."""
    change, dtypes = FORMS[form]
    path = Path(folder, "model.safetensors")
    weights = change(load_file(path))
    save_file(weights, path, metadata={"format": "pt"})
    return weights, dtypes


@pytest.mark.parametrize(("kind", "form"), [*(("text", form) for form in FORMS), *BOTH])
def test_a_base_in_any_form_is_merged_as_it_is_rounded_to_bf16(bases, tmp_path, kind, form):
    model, adapter = bases[kind]
    base = shutil.copytree(model, tmp_path / "base")
    weights, dtypes = save_as(base, form)
    gemma_folder.check(base, base, "")
    assert gemma_folder.rounded_from(base) == dtypes
    model, _ = merging.load_with_adapter(base, adapter, torch.device("cpu"), torch.float32)
    merging.save_merged(model, tmp_path / "out")
    head = form.endswith("copy of the embedding")
    others = len(weights) - 14 - head
    assert merge_proof.prove_weights(base, adapter, tmp_path / "out") == (14, others)
    merged = {tail(name): w for name, w in load_file(tmp_path / "out/model.safetensors").items()}
    lora = {tail(name): w for name, w in load_file(adapter / "adapter_model.safetensors").items()}
    for name, weight in weights.items():
        rounded, new = weight.to(torch.bfloat16), merged.get(tail(name))
        a, b = (lora.get(tail(name).replace("weight", f"lora_{x}.weight")) for x in "AB")
        if head and name == "lm_head.weight":
            assert new is None
        elif a is None or "vision" in name:
            assert torch.equal(new, rounded), name
        else:
            exact = rounded.double() + 2 * b.double() @ a.double()
            assert ((new.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-7).all()
            assert not torch.equal(new, rounded)


@pytest.mark.parametrize("declared", ["dtype", "torch_dtype"])
def test_the_merged_config_says_bf16_where_the_bases_said_something_else(bases, tmp_path, declared):
    path = tmp_path / "config.json"
    config = json.loads(Path(bases["multimodal"][0], "config.json").read_text())
    config.pop("dtype")
    path.write_text(json.dumps(config | {declared: "bfloat16"}))
    before = path.read_bytes()
    gemma_folder.declare_bf16(path)
    assert path.read_bytes() == before
    config |= {declared: "float32"}
    config["text_config"][declared] = "float16"
    path.write_text(json.dumps(config))
    gemma_folder.declare_bf16(path)
    assert "float32" not in path.read_text()
    assert "float16" not in path.read_text().replace("bfloat16", "")
    assert json.loads(path.read_text())[declared] == "bfloat16"


def test_what_was_trained_on_a_base_that_is_not_in_bf16_is_merged(tiny_text_model, few_rows, tmp_path):
    save_as(shutil.copytree(tiny_text_model, tmp_path / "base"), "all three")
    flags = ["--rehearse", "--model", "./base", "--data", few_rows, "--epochs", 1, "--learning-rate", 0.01]
    code, _, errors = run_training(*flags, folder=tmp_path)
    assert code == 0, errors
    code, out, errors = run_main(merge.main, "--output", "out", folder=tmp_path)
    assert code == 0, errors
    assert "base       F16 and F32 in its files, merged as it is rounded to bf16\n" in out
    assert "14 modules changed, each by B·A·alpha/r within bf16 rounding" in out
    assert "14 other tensors are the base's in bf16, bit for bit" in out


def test_a_rank_stabilized_adapter_is_merged_by_its_own_scale(bases, tmp_path):
    base, adapter = bases["text"]
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True}))
    model, _ = merging.load_with_adapter(base, copy, torch.device("cpu"), torch.float32)
    merging.save_merged(model, tmp_path / "out")
    assert merge_proof.prove_weights(base, copy, tmp_path / "out") == (14, 14)
    with pytest.raises(UserError, match="did not change by"):
        merge_proof.prove_weights(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("where", ["base", "adapter"])
def test_weights_too_large_for_bf16_or_to_be_added_are_one_line(tiny_text_model, tmp_path, where):
    base = shutil.copytree(tiny_text_model, tmp_path / "base")
    copy = write_tiny_adapter(tmp_path / "adapter", str(base))
    path = base / "model.safetensors" if where == "base" else copy / "adapter_model.safetensors"
    weights = {name: w.float() for name, w in load_file(path).items()}
    for name, weight in weights.items():
        if "layers.0.mlp.up_proj" in name:
            weight[0, 0] = 3.4e38
    save_file(weights, path, metadata={"format": "pt"})
    code, _, errors = run_main(merge.main, "--adapter", copy, "--output", tmp_path / "out")
    assert code == 1
    assert errors == merging.NOT_FINITE + "\n"
    assert not (tmp_path / "out").exists()


def test_products_that_cancel_may_be_summed_in_another_order():
    """As an H100 did it to one element of Gemma 3 270M: an old -0.0, and terms that nearly cancel."""
    a, b = torch.tensor([[1e-3], [1e-3]]), torch.tensor([[1.0, -1.0 + 5e-6]])
    delta = b @ a
    other_order = (delta + 5e-11).bfloat16()
    old = torch.tensor([[-0.0]], dtype=torch.bfloat16)
    merge_proof.prove_sum("w", old, (a, b, 1.0), other_order)
    with pytest.raises(UserError, match="did not change by"):
        merge_proof.prove_sum("w", old, (a, b, 1.0), (delta * 1.2).bfloat16())
