"""Rows token by token are the labels of training, and are shown so in a terminal with colors or without."""

import sys

import pytest

from tests.support.rows import row
from train_qlora import preprocess_function
from tuner.data import labels


def test_pieces_are_the_labels_of_training(tokenizer):
    shown = labels.pieces(row("Да", "Нет <b>"), tokenizer, preprocess_function)
    batch = preprocess_function({"messages": [row("Да", "Нет <b>")["messages"]]}, tokenizer)
    assert [trained for _, trained, _ in shown] == [label != -100 for label in batch["labels"][0]]
    assert "".join(text for text, _, _ in shown) == tokenizer.decode(batch["input_ids"][0])
    assert [text for text, _, special in shown if special] == [
        *["<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_turn>", "<end_of_turn>"]
    ]


def test_counts_are_those_of_all_rows_however_many_are_tokenized_together(tokenizer, monkeypatch):
    rows = list(enumerate([row("а" * n, "Да.", "б", "Нет." * n) for n in range(1, 8)], 1))
    counts = labels.count_tokens(rows, tokenizer, preprocess_function)
    batch = preprocess_function({"messages": [r["messages"] for _, r in rows]}, tokenizer)
    assert counts == [(len(r), sum(label != -100 for label in r)) for r in batch["labels"]]
    monkeypatch.setattr(labels, "ROWS_AT_ONCE", 3)
    assert labels.count_tokens(rows, tokenizer, preprocess_function) == counts


def test_a_row_is_too_long_from_one_token_over_the_limit():
    (fault,) = labels.too_long([3, 5], [2048, 2049], 2048)
    assert fault == (5, "the row has 2049 tokens, more than 2048; shorten it or split it in two")


@pytest.mark.parametrize(
    ("terminal", "shown"),
    [(False, "<b>⏎\nа⟦б<e>⟧⏎"), (True, "\x1b[1;90m<b>\x1b[0m\x1b[90m⏎\x1b[0m\n\x1b[90mа\x1b[0m"
      "\x1b[32mб\x1b[0m\x1b[1;32m<e>\x1b[0m\x1b[90m⏎\x1b[0m")],
)  # fmt: skip
def test_trained_tokens_are_green_or_between_brackets(monkeypatch, terminal, shown):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    pieces = [("<b>", False, True), ("\n", False, False), ("а", False, False), ("б", True, False)]
    pieces += [("<e>", True, True), ("\n", False, False)]
    assert labels.format_pieces(pieces) == shown
