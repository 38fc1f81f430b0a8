"""Gemma's vocabulary as a GGUF file has it, from tokenizer.json alone: tokens, scores and types.

llama.cpp's converter takes these from SentencePiece's tokenizer.model. Of a folder without one it writes
merges, and the name of another model's tokenizer; Ollama's Gemma 3 looks for scores and finds none.
"""

import json
import re

from gguf import TokenType

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# Control tokens that Gemma's own tokenizer.json does not call special.
LIKE_SPECIAL = re.compile(r"<pad>|<mask>|<unused\d+>")
PADDING_SCORE, ADDED_SCORE = -10000.0, -1000.0  # the converter's


def read_vocabulary(folder, size):
    """Return (tokens, scores, types), lists of one length, of a folder's first `size` tokens."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    added = {token["content"]: token["special"] for token in tokenizer["added_tokens"]}
    pieces = tokenizer["model"]["vocab"]
    pieces = {**pieces, **{token["content"]: token["id"] for token in tokenizer["added_tokens"]}}
    scores = piece_scores(tokenizer["model"], added)
    rows = [(f"[PAD{number}]", PADDING_SCORE, TokenType.UNUSED) for number in range(size)]
    for text, number in pieces.items():
        if number < size:
            rows[number] = vocabulary_row(text, added, scores)
    return tuple(map(list, zip(*rows, strict=True)))


def vocabulary_row(text, added, scores):
    """Return (token, score, type) of a piece; added: {text of an added token: whether it is special}."""
    if not is_merged(text, added):
        if added.get(text) or LIKE_SPECIAL.fullmatch(text):
            return text, ADDED_SCORE, TokenType.CONTROL
        return text.replace("▁", " "), ADDED_SCORE, TokenType.USER_DEFINED
    if BYTE.fullmatch(text):
        return text, 0.0, TokenType.BYTE
    return text, scores[text], TokenType.NORMAL


def is_merged(text, added):
    """Return whether a piece is made by merges, not found in the text as a whole.

    Runs of blanks are found, in all of Gemma 3: transformers drops their marks on reading a GGUF, and so they
    are not in the small model's list.
    """
    return text not in added and not (len(text) > 1 and set(text) == {"▁"})


def piece_scores(model, added):
    """Return {piece: score} as SentencePiece numbers them: merges in their order, then single characters.

    A higher score merges first. Those of single characters order nothing; in Gemma's vocabulary they begin 31
    below where the merges end, and it has 31 runs of tabs among the added tokens.
    """
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    merges = dict.fromkeys(text for text in map("".join, pairs) if is_merged(text, added))
    scores = {text: -float(rank) for rank, text in enumerate(merges)}
    others = (text for text in sorted(model["vocab"], key=model["vocab"].get) if text not in scores)
    singles = [text for text in others if is_merged(text, added) and not BYTE.fullmatch(text)]
    first = len(merges) + sum(set(text) == {"\t"} for text in added)
    return scores | {text: -float(first + index) for index, text in enumerate(singles)}
