"""Rows as token ids and labels, in a datasets.Dataset; a large set is tokenized once."""

import hashlib
import inspect
import json
from pathlib import Path

import datasets

from tuner.data import labels
from tuner.system.errors import rows_error

CACHED_ROWS = 10_000  # these take some seconds to tokenize; fewer are not worth a file


def tokenize_rows(data_path, rows, tokenizer, preprocess_function, max_tokens):
    """Return chat_rows.Rows as a datasets.Dataset with input_ids, attention_mask and labels.

    CACHED_ROWS or more rows are kept in the cache of datasets and read from there the next time.
    Raise UserError that lists the rows of over max_tokens by their line in data_path.
    """
    datasets.disable_progress_bars()  # the bar of the run is the training's
    messages = datasets.Dataset.from_list([{"messages": row["messages"]} for row in rows])

    def tokenize(cache_file):
        return messages.map(
            preprocess_function,
            batched=True,
            fn_kwargs={"tokenizer": tokenizer},
            remove_columns=["messages"],
            new_fingerprint="tokens",  # a tokenizer has no hash that stays the same
            cache_file_name=cache_file,
        )

    cache_file = None
    if len(rows) >= CACHED_ROWS:
        name = f"tokens-{label_fingerprint(rows, tokenizer, preprocess_function)}.arrow"
        cache_file = str(Path(datasets.config.HF_DATASETS_CACHE, name))
    try:
        dataset = tokenize(cache_file)
    except OSError:  # a cache that cannot be written, or is full
        dataset = tokenize(None)
    lengths = [len(ids) for ids in dataset["input_ids"]]
    if max(lengths) > max_tokens:
        raise rows_error(data_path, labels.too_long(rows.lines, lengths, max_tokens))
    return dataset


def label_fingerprint(rows, tokenizer, preprocess_function):
    """Return the sha256 of all that labels come from: rows, tokenizer, template and code."""
    digest = hashlib.sha256(json.dumps(rows).encode())
    code = inspect.getsource(preprocess_function)
    for text in (tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, code):
        digest.update(text.encode())
    return digest.hexdigest()


def token_fingerprint(examples):
    """Return the sha256 of all examples' input_ids and labels: a run resumes only with the same."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example["input_ids"], example["labels"]]).encode())
    return digest.hexdigest()
