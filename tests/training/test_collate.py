"""Padded micro-batches as tensors."""

from tuner.training import collate


def test_pads_are_masked_and_never_the_end_token(examples):
    few = sorted(examples, key=lambda e: len(e["input_ids"]))[:3]
    ids, mask, labels = collate.collate_padded(few, 0, "cpu")
    assert ids.shape == mask.shape == labels.shape == (3, len(few[2]["input_ids"]))
    for row, example in enumerate(few):
        length = len(example["input_ids"])
        assert ids[row].tolist() == example["input_ids"] + [0] * (ids.shape[1] - length)
        assert mask[row].tolist() == [1] * length + [0] * (ids.shape[1] - length)
        assert labels[row].tolist() == example["labels"] + [-100] * (ids.shape[1] - length)


def test_where_the_end_token_pads_its_labels_are_kept():
    example = {"input_ids": [2, 7, 1], "attention_mask": [1, 1, 1], "labels": [-100, 7, 1]}
    ids, mask, labels = collate.collate_padded([example, {k: v * 2 for k, v in example.items()}], 1, "cpu")
    assert ids[0].tolist() == [2, 7, 1, 1, 1, 1]
    assert mask[0].tolist() == [1, 1, 1, 0, 0, 0]
    assert labels[0].tolist() == [-100, 7, 1, -100, -100, -100]
