"""Turn the rows of a micro-batch into tensors: padded, or packed."""


def collate_packed(pack, length, slots, pad_id):
    """Returns what a packed micro-batch consists of, on the CPU.

    input_ids, positions (each row's own), documents (which row; −1 where it is padded): (length,)
    places, targets: (slots,), where a trained token is predicted, and that token; −100 where there is none.
    """
    import torch

    ids, positions, documents, places, targets = [], [], [], [], []
    for number, example in enumerate(pack):
        start = len(ids)
        for place, label in enumerate(example["labels"][1:]):
            if label != -100:
                places.append(start + place)
                targets.append(label)
        ids += example["input_ids"]
        positions += range(len(example["input_ids"]))
        documents += [number] * len(example["input_ids"])
    rest, unused = length - len(ids), slots - len(places)
    return {
        "input_ids": torch.tensor(ids + [pad_id] * rest),
        "positions": torch.tensor(positions + [0] * rest),
        "documents": torch.tensor(documents + [-1] * rest),
        "places": torch.tensor(places + [0] * unused),
        "targets": torch.tensor(targets + [-100] * unused),
    }


def collate_padded(examples, pad_id, device):
    """Returns input_ids, attention_mask, labels as tensors (rows, longest row); pads are masked in both."""
    import torch

    longest = max(len(e["input_ids"]) for e in examples)

    def tensor(key, filler):
        rows = [list(e[key]) + [filler] * (longest - len(e[key])) for e in examples]
        return torch.tensor(rows, device=device)

    return tensor("input_ids", pad_id), tensor("attention_mask", 0), tensor("labels", -100)
