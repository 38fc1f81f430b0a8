"""Turn the examples of a micro-batch into tensors: padded to the longest, or packed end to end."""

import torch


def collate_padded(examples, pad_id, device):
    """Return input_ids, attention_mask, labels: (examples, longest example). Pads are masked in both."""
    longest = max(len(e["input_ids"]) for e in examples)

    def tensor(key, filler):
        rows = [list(e[key]) + [filler] * (longest - len(e[key])) for e in examples]
        return torch.tensor(rows, device=device)

    return tensor("input_ids", pad_id), tensor("attention_mask", 0), tensor("labels", -100)


def collate_packed(pack, length, slots, pad_id):
    """Return a packed micro-batch, a dict of tensors on the CPU.

    input_ids, position_ids (from 0 in each example), sequence_ids (which example; −1 for padding): (length,)
    loss_positions, targets: (slots,), where a trained token is predicted, and that token; −100 if unused.
    """
    input_ids, position_ids, sequence_ids, loss_positions, targets = [], [], [], [], []
    for number, example in enumerate(pack):
        start = len(input_ids)
        for position, label in enumerate(example["labels"][1:]):
            if label != -100:
                loss_positions.append(start + position)
                targets.append(label)
        input_ids += example["input_ids"]
        position_ids += range(len(example["input_ids"]))
        sequence_ids += [number] * len(example["input_ids"])
    padding, unused = length - len(input_ids), slots - len(loss_positions)
    return {
        "input_ids": torch.tensor(input_ids + [pad_id] * padding),
        "position_ids": torch.tensor(position_ids + [0] * padding),
        "sequence_ids": torch.tensor(sequence_ids + [-1] * padding),
        "loss_positions": torch.tensor(loss_positions + [0] * unused),
        "targets": torch.tensor(targets + [-100] * unused),
    }
