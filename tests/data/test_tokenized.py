"""Rows as tokens: too long ones, and those of a large set, which are kept."""

import json
from copy import deepcopy

import datasets
import pytest

import train_qlora
from tests.support.training import ROOT, shipped_rows, tokenize, turn
from tuner.data import tokenized
from tuner.system.errors import UserError


def test_a_row_over_the_limit_is_an_error_with_its_line(tmp_path, tokenizer):
    path = tmp_path / "rows.json"
    long = {"messages": [turn("user", "я" * 2040), turn("assistant", "да")]}
    short = {"messages": [turn("user", "я"), turn("assistant", "да")]}
    path.write_text("\n" + json.dumps(short) + "\n" + json.dumps(long) + "\n")
    with pytest.raises(UserError) as caught:
        tokenize(path, train_qlora.load_data(path), tokenizer)
    assert str(caught.value) == (
        f"{path}:3: the row has 2060 tokens, more than 2048; shorten it or split it in two"
    )


def test_tokens_of_many_rows_are_read_again_and_not_of_others(tokenizer, monkeypatch, tmp_path):
    rows = shipped_rows()
    monkeypatch.setattr(tokenized, "CACHED_ROWS", 70)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "rows.json"

    def tokens(rows, tokenizer):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return list(tokenize(path, rows, tokenizer)), len(list((tmp_path / "cache").glob("*")))

    plain = list(tokenize(ROOT / "examples.json", rows[:69], tokenizer))
    first, files = tokens(rows, tokenizer)
    assert (first[:69], files) == (plain, 1)
    cached = next((tmp_path / "cache").iterdir())
    written = cached.stat().st_mtime_ns
    assert tokens(rows, tokenizer) == (first, 1)
    assert cached.stat().st_mtime_ns == written
    assert tokens([rows[1], *rows[1:]], tokenizer)[0] == [first[1], *first[1:]]
    other = deepcopy(tokenizer)
    other.chat_template = "{# another #}" + other.chat_template
    tokens(rows, other)
    # What a file's rows are read as may change while the file does not.
    again = tokenize(path, [rows[2], *rows[1:]], other)
    assert next(iter(again)) == first[2]
    assert len(list((tmp_path / "cache").glob("*"))) == 4
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", path / "no folder")
    assert tokens(rows, tokenizer)[0] == first
