"""What is refused about a base before transformers sees it, by every script, in one line."""

import ast
import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import check
import compare
import merge
import serve
import train_qlora
from tests.support.scripts import run_main
from tests.support.tiny_models import write_tiny_model
from tests.support.training import load_base
from tuner.model import gemma_folder, gemma_tokenizer
from tuner.system.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CURE = "choose another base"
CODE = "from pathlib import Path\nPath({!r}).touch()\nclass Evil:\n    pass\n"


@pytest.fixture
def base(tiny_text_model, tmp_path):
    return Path(shutil.copytree(tiny_text_model, tmp_path / "base"))


def edit(path, part=None, **changes):
    values = json.loads(path.read_text()) if path.exists() else {}
    (values.setdefault(part, {}) if part else values).update(changes)
    path.write_text(json.dumps(values))


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def convert(base, dtype):
    path = base / "model.safetensors"
    save_file({name: w.to(dtype) for name, w in load_file(path).items()}, path, metadata={"format": "pt"})


def quantize(base):
    edit(base / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


def only_a_pickle(base):
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()


AUTO = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
REMOTE = {"AutoConfig": "someone/else--evil.Evil"}
REFUSED = {
    "a model of its own": (
        lambda b: edit(b / "config.json", model_type="evil", auto_map=AUTO),
        "names code to run (config.json: auto_map)",
    ),
    "code of another repository": (
        lambda b: edit(b / "config.json", auto_map=REMOTE),
        "names code to run (config.json: auto_map)",
    ),
    "code in a part": (
        lambda b: edit(b / "config.json", "vision_config", auto_map=AUTO),
        "names code to run (config.json: auto_map)",
    ),
    "a kernel to download": (
        lambda b: edit(b / "config.json", attn_implementation="someone/kernel"),
        "names code to run (config.json: attn_implementation)",
    ),
    "a tokenizer of its own": (
        lambda b: edit(b / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}),
        "names code to run (tokenizer_config.json: auto_map)",
    ),
    "a processor of its own": (
        lambda b: edit(b / "processor_config.json", auto_map={"AutoProcessor": "evil.Evil"}),
        "names code to run (processor_config.json: auto_map)",
    ),
    "another model": (lambda b: edit(b / "config.json", model_type="llama"), 'model_type is "llama"'),
    "no model type": (lambda b: edit(b / "config.json", model_type=None), "model_type is null"),
    "another vision tower": (
        lambda b: edit(b / "config.json", "vision_config", model_type="timm_wrapper"),
        'vision_config.model_type is "timm_wrapper"',
    ),
    "a part that is no object": (
        lambda b: edit(b / "config.json", text_config=3),
        "text_config.model_type is 3",
    ),
    "another tokenizer": (
        lambda b: edit(b / "tokenizer_config.json", tokenizer_class="RagTokenizer"),
        'another tokenizer than Gemma\'s (tokenizer_config.json: "RagTokenizer")',
    ),
    "no window": (
        lambda b: edit(b / "config.json", sliding_window=None),
        "(config.json: sliding_window is null)",
    ),
    "no picture": (lambda b: edit(b / "config.json", image_token_index=None), "image_token_index is null"),
    "no layers": (lambda b: edit(b / "config.json", num_hidden_layers=0), "num_hidden_layers is 0"),
    "too many heads": (
        lambda b: edit(b / "config.json", num_attention_heads=10**30),
        "num_attention_heads is 10",
    ),
    "a width as text": (lambda b: edit(b / "config.json", hidden_size="64"), 'hidden_size is "64"'),
    "another width": (
        lambda b: edit(b / "config.json", hidden_size=128),
        "(config.json: hidden_size is 128, in the weights it is 64)",
    ),
    "a wall of layers": (
        lambda b: edit(b / "config.json", num_hidden_layers=10**6),
        "(config.json: num_hidden_layers is 1000000, in the weights it is 2)",
    ),
    "words for nobody": (
        lambda b: edit(b / "config.json", vocab_size=2**24),
        "vocab_size is 16777216, in the weights it is 512",
    ),
    "quantized": (quantize, "is quantized already; use the unquantized model"),
    "in 8 bits": (lambda b: convert(b, torch.int8), "has weights in I8 ("),
    "in fp64": (lambda b: convert(b, torch.float64), "has weights in F64 ("),
    "only a pickle": (only_a_pickle, "is not a complete model folder (model.safetensors missing)"),
    "an adapter on it": (lambda b: edit(b / "adapter_config.json"), "has an adapter_config.json beside"),
    "config cut": (lambda b: cut(b / "config.json"), "is damaged (config.json: "),
    "config no object": (lambda b: (b / "config.json").write_text("[]"), "(config.json: no JSON object)"),
    "config too deep": (
        lambda b: (b / "config.json").write_text('{"a":' * 10**5),
        "is damaged (config.json: ",
    ),
    "generation config cut": (lambda b: cut(b / "generation_config.json"), "(generation_config.json: "),
    "weights cut": (lambda b: cut(b / "model.safetensors"), "is damaged (model.safetensors: "),
    "weights a page": (lambda b: (b / "model.safetensors").write_text("<html>"), "(model.safetensors: "),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_base_that_is_no_whole_gemma_3_is_refused_in_one_line(base, what):
    gemma_folder.check(base, base, CURE)
    change, message = REFUSED[what]
    change(base)
    with pytest.raises(UserError) as error:
        gemma_folder.check(base, base, CURE)
    assert str(error.value).startswith(f"{base} ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert "; " in str(error.value)


@pytest.mark.parametrize(
    "key", ["hidden_size", "num_channels", "patch_size", "intermediate_size", "num_hidden_layers"]
)
def test_a_vision_tower_of_another_size_is_refused_before_it_is_made(tmp_path, key):
    base = Path(write_tiny_model(tmp_path / "base", multimodal=True))
    gemma_folder.check(base, base, CURE)
    edit(base / "config.json", "vision_config", **{key: 2**30})
    with pytest.raises(UserError, match=rf"{key} is 1073741824, in the weights it is \d+"):
        gemma_folder.check(base, base, CURE)


def test_a_pipe_is_not_waited_for(base):
    (base / "generation_config.json").unlink()
    os.mkfifo(base / "generation_config.json")
    gemma_folder.check(base, base, CURE)
    (base / "config.json").unlink()
    os.mkfifo(base / "config.json")
    with pytest.raises(UserError, match=r"config\.json missing"):
        gemma_folder.check(base, base, CURE)


def test_values_that_run_nothing_are_let_through(base):
    edit(base / "config.json", attn_implementation="sdpa", auto_map={}, _attn_implementation=None)
    gemma_folder.check(base, base, CURE)
    edit(base / "config.json", "rope_parameters", nested='{"a":' * 900)
    gemma_folder.check(base, base, CURE)


def test_every_auto_class_is_told_to_run_no_code():
    calls = []
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tuner/**/*.py"), *ROOT.glob("benchmarks/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name.endswith((".from_pretrained", ".from_config")) and not name.startswith("PeftModel."):
                calls.append((path.name, name, {k.arg: ast.unparse(k.value) for k in node.keywords}))
    assert len(calls) >= 5
    assert [call for call in calls if call[2].get("trust_remote_code") != "False"] == []


SCRIPTS = {
    "compare": (compare.main, ["--adapter", "a"], 2),
    "merge": (merge.main, ["--adapter", "a", "--output", "out"], 1),
    "serve": (serve.main, ["--adapter", "a", "--port", 0], 1),
    "serve a model": (serve.main, ["--model", "a/base", "--port", 0], 1),
    "train": (train_qlora.main, ["--rehearse", "--model", "a/base"], 1),
    "check": (check.main, ["--offline", "--model", "a/base"], 1),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_runs_code_of_a_strangers_base_or_asks_whether_to(
    adapter, tiny_text_model, few_rows, tmp_path, monkeypatch, script
):
    folder = shutil.copytree(adapter, tmp_path / "a")
    edit(folder / "adapter_config.json", base_model_name_or_path="a/base")
    base = Path(shutil.copytree(tiny_text_model, folder / "base"))
    edit(base / "config.json", model_type="evil", auto_map=AUTO)
    (base / "evil.py").write_text(CODE.format(str(tmp_path / "ran")))
    for name in ("examples.json", "heldout.json", "probes.json"):
        shutil.copyfile(few_rows, tmp_path / name)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 10))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    main, flags, expected = SCRIPTS[script]
    code, _, errors = run_main(main, *flags, folder=tmp_path, error_code=2 if main is compare.main else 1)
    assert sys.stdin.tell() == 0, "asked"
    assert not (tmp_path / "ran").exists()
    assert code == expected
    assert len(errors.splitlines()) == 1
    assert "a/base names code to run (config.json: auto_map), which is never done here; " in errors


def replace(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


TOKENIZERS = {
    "cut short": lambda b: cut(b / "tokenizer.json"),
    "no object": lambda b: (b / "tokenizer.json").write_text("[]"),
    "a page": lambda b: (b / "tokenizer.json").write_text("<html>"),
    "of another kind": lambda b: replace(b / "tokenizer.json", '"type": "BPE"', '"type": "WordPiece"'),
    "no bos": lambda b: edit(b / "tokenizer_config.json", bos_token=""),
    "another bos": lambda b: edit(b / "tokenizer_config.json", bos_token="<eos>"),
    "no pad": lambda b: edit(b / "tokenizer_config.json", pad_token=None),
    "a tag of many tokens": lambda b: replace(b / "tokenizer.json", '"<start_of_turn>"', '"<start_of_time>"'),
    "letters lost": lambda b: edit(b / "tokenizer.json", decoder=None),
    "a length that is none": lambda b: edit(b / "tokenizer_config.json", model_max_length=[]),
    "config cut": lambda b: cut(b / "tokenizer_config.json"),
    "template cut": lambda b: cut(b / "chat_template.jinja"),
    "another template": lambda b: (b / "chat_template.jinja").write_text("{{ messages[0].content }}"),
    "a template that refuses": lambda b: (b / "chat_template.jinja").write_text(
        "{{ raise_exception('no') }}"
    ),
    "a template that fails": lambda b: (b / "chat_template.jinja").write_text("{{ 1 // 0 }}{{ 1 / 0 }}"),
    "a template without end": lambda b: (b / "chat_template.jinja").write_text("{% for a in b %}"),
    "no template": lambda b: (b / "chat_template.jinja").unlink(),
}


ENDLESS = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}
SLOW = "{% for a in range(9999) %}{% for b in range(500) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer", "decoder"])
def test_a_tokenizer_with_a_regular_expression_is_refused(base, part):
    split = {"type": "Split", "pattern": ENDLESS["pattern"], "behavior": "Removed", "invert": False}
    inner = split if part == "pre_tokenizer" else ENDLESS
    kind, parts = {
        "normalizer": ("Sequence", "normalizers"),
        "pre_tokenizer": ("Sequence", "pretokenizers"),
        "decoder": ("Sequence", "decoders"),
    }[part]
    edit(base / "tokenizer.json", **{part: {"type": kind, parts: [inner]}})
    with pytest.raises(UserError, match="its tokenizer has a regular expression, Gemma 3's has none; choose"):
        gemma_tokenizer.load_tokenizer(base)


def test_a_chat_template_that_takes_for_ever_is_given_up(base, monkeypatch):
    monkeypatch.setattr(gemma_tokenizer, "TEMPLATE_SECONDS", 0.1)
    (base / "chat_template.jinja").write_text(SLOW)
    with pytest.raises(UserError, match=r"its chat template takes more than 0.1 s for two words; copy"):
        gemma_tokenizer.load_tokenizer(base)


@pytest.mark.parametrize("what", TOKENIZERS)
def test_a_tokenizer_that_is_not_gemmas_is_one_line(base, what):
    TOKENIZERS[what](base)
    if what == "a length that is none":  # no row is as long as any that Gemma's says, and it is not asked
        gemma_tokenizer.load_tokenizer(base)
        return
    with pytest.raises(UserError) as error:
        gemma_tokenizer.load_tokenizer(base)
    assert str(base) in str(error.value)
    assert str(error.value).isprintable()
    assert "; " in str(error.value)


@pytest.mark.parametrize("key", ["eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", [-1, 512, 10**12, "1", [], [1, "x"], 1.5, True, {"a": 1}])
def test_end_tokens_that_are_none_are_one_line(base, key, value):
    edit(base / "generation_config.json", **{key: value})
    with pytest.raises(UserError, match=r"base (is damaged \(generation_config|cannot be loaded)"):
        load_base(str(base), None)


def test_how_the_folder_would_sample_changes_no_answer(base):
    wild = {"temperature": 0.1, "num_beams": 7, "cache_implementation": "static", "min_length": 99}
    edit(base / "generation_config.json", **wild)
    settings = load_base(str(base), None).generation_config
    assert (settings.eos_token_id, settings.pad_token_id, settings.bos_token_id) == ([1, 106], 0, 2)
    assert settings.to_diff_dict().keys() <= {
        "eos_token_id",
        "pad_token_id",
        "bos_token_id",
        "transformers_version",
    }


def test_a_link_to_a_file_elsewhere_could_take_a_private_one_along_and_is_refused(base, tmp_path):
    private = tmp_path / "id_rsa"
    private.write_text("secret")
    for name in ("LICENSE", "tokenizer.model", "NOTICE.txt"):
        (base / name).symlink_to(private)
        with pytest.raises(UserError, match=f"{name} is a link to a file elsewhere; put a copy of that"):
            gemma_folder.check(base, "base", CURE)
        (base / name).unlink()
    (base / "real").write_text("a license")
    (base / "LICENSE").symlink_to("real")
    gemma_folder.check(base, "base", CURE)


def test_the_links_of_the_hubs_cache_are_its_own(base, tmp_path):
    snapshot = tmp_path / "models--google--gemma-3-4b-it" / "snapshots" / "abc"
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(base.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    gemma_folder.check(snapshot, "base", CURE)
