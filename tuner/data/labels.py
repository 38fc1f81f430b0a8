"""Rows as training sees them, token by token: which are trained, how many, and whether a row is too long.

preprocess_function is train_qlora's, the function by which training makes its labels.
"""

from collections import defaultdict

from tuner.data import chat_text, row_faults
from tuner.system import console

ROWS_AT_ONCE = 1000  # tokenized together, then only their counts are kept
GREEN, GRAY, BOLD = "32", "90", "1;"


def count_tokens(rows, tokenizer, preprocess_function):
    """Return [(tokens, trained tokens), …] of rows, [(line, row), …]."""
    counts = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        messages = [row["messages"] for _, row in rows[start : start + ROWS_AT_ONCE]]
        labels = preprocess_function({"messages": messages}, tokenizer)["labels"]
        counts += [(len(row_labels), len(row_labels) - row_labels.count(-100)) for row_labels in labels]
    return counts


def pieces(row, tokenizer, preprocess_function):
    """Return [(text, trained, special), …], one for each token of a row."""
    batch = preprocess_function({"messages": [row["messages"]]}, tokenizer)
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    texts = [token.replace("▁", " ") for token in tokenizer.convert_ids_to_tokens(ids)]
    # A row's own text cannot hold a control token, so these are the template's.
    return [
        (text, label != -100, text in row_faults.CONTROL_TOKENS)
        for text, label in zip(texts, labels, strict=True)
    ]


def format_pieces(pieces):
    """Return pieces as text to print: trained ones in green, or between ⟦ and ⟧ where there are no colors."""
    colors = console.has_colors()
    text, was_trained = "", False
    for piece, trained, special in pieces:
        shown = console.printable(piece.replace("\n", "⏎"), 100)
        if colors:
            shown = console.colorize(shown, BOLD * special + (GREEN if trained else GRAY))
        elif trained != was_trained:
            shown = ("⟦" if trained else "⟧") + shown
        text += shown + "\n" * piece.count("\n")
        was_trained = trained
    return text.rstrip("\n") + "⟧" * (was_trained and not colors)


def page_rows(rows, warnings, tokenizer, preprocess_function):
    """Yield what label_page.write wants of each of the rows; warnings: [RowWarning, …]."""
    texts = defaultdict(list)  # by row: an array may have all of its rows on one line
    for warning in warnings:
        texts[id(warning.row or rows[0][1])].append(warning.text)
    for line, row in rows:
        yield {
            "line": line,
            "call": chat_text.has_call(row["messages"]),
            "pieces": pieces(row, tokenizer, preprocess_function),
            "warnings": texts[id(row)],
        }


def too_long(lines, lengths, max_tokens):
    """Return [(line, error), …] for rows that have more than max_tokens tokens."""
    return [
        (line, f"the row has {length} tokens, more than {max_tokens}; shorten it or split it in two")
        for line, length in zip(lines, lengths, strict=True)
        if length > max_tokens
    ]
