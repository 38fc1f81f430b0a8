"""llama.cpp's own converter, if LLAMA_CPP names a folder with its sources, and a tokenizer as Google's."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
CALLED = ["<start_of_turn>", "<end_of_turn>"]  # special too, in tokenizer.json
DEFINED = [*CALLED, "<mask>", "<unused0>", "[multimodal]", "\n", "\n\n", "▁▁", "▁▁▁", "<table>"]


def converter():
    """Return the path of convert_hf_to_gguf.py; skip the test if there is none, or it cannot run."""
    path = Path(os.environ.get("LLAMA_CPP", ""), "convert_hf_to_gguf.py")
    if not path.is_file():
        pytest.skip("LLAMA_CPP does not name a folder with llama.cpp's convert_hf_to_gguf.py")
    pytest.importorskip("sentencepiece")
    return path


def convert(folder, kind, output):
    """Convert a model folder with llama.cpp's converter."""
    command = [sys.executable, converter(), folder, "--outtype", kind, "--outfile", output]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def write_sentencepiece(folder, text, size):
    """Train a SentencePiece model on text, and put it and a tokenizer.json of it into a model folder."""
    import sentencepiece  # a test that asks for this has checked that it is there

    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_writer=trained, model_type="bpe", vocab_size=size,
        byte_fallback=True, add_dummy_prefix=False, remove_extra_whitespaces=False,
        normalization_rule_name="identity", user_defined_symbols=DEFINED, minloglevel=2,
        **{f"{token.strip('<>')}_{what}": value for number, token in enumerate(SPECIAL)
           for what, value in (("id", number), ("piece", token))},
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(trained.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    tokens = [pieces.IdToPiece(number) for number in range(size)]
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["model"]["vocab"] = ids = {token: number for number, token in enumerate(tokens)}
    order = sorted(tokens, key=lambda token: (-pieces.GetScore(ids[token]), ids[token]))
    splits = [(token[:cut], token[cut:]) for token in order for cut in range(1, len(token))]
    tokenizer["model"]["merges"] = [pair for pair in splits if pair[0] in ids and pair[1] in ids]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer["added_tokens"] = [
        {"id": ids[token], "content": token, **plain, "special": token in SPECIAL + CALLED}
        for token in SPECIAL + DEFINED
    ] + [{"id": size, "content": "<image_soft_token>", **plain, "special": True}]
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    added = {token["id"]: {**token, "id": None} for token in tokenizer["added_tokens"]}
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config |= {"add_bos_token": True, "add_eos_token": False, "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "added_tokens.json").write_text(json.dumps({"<image_soft_token>": size}))
