"""Split a step's examples into micro-batches: padded to their longest, or packed end to end.

An example is a dict of token lists, input_ids and labels (−100 where a token is not trained).
"""


def length(example):
    """Return the tokens of an example."""
    return len(example["input_ids"])


def total_tokens(examples):
    return sum(map(length, examples))


def trained_tokens(examples):
    """Return the tokens that the loss is of. The first of an example is predicted from nothing, so never."""
    return sum(label != -100 for example in examples for label in example["labels"][1:])


def shard(examples, state):
    """Return this process's examples of a step, longest first: dealt out in turn, so that all work equally.

    state: accelerate's PartialState, or any object with process_index and num_processes.
    """
    return sorted(examples, key=length, reverse=True)[state.process_index :: state.num_processes]


def group_padded(items, length, tokens):
    """Split items, longest first, into lists of at most `tokens` (items × longest).

    length(item) is in tokens. An item longer than that gets a list of its own.
    """
    groups = []
    for item in items:
        if groups and (len(groups[-1]) + 1) * length(groups[-1][0]) <= tokens:
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def group_packed(examples, tokens):
    """Put each of the examples, longest first, into the first pack of at most `tokens` that has room for it.

    An example longer than that gets a pack of its own. Return the packs, lists of examples.
    """
    packs, room = [], []
    for example in examples:
        pack = next((i for i, free in enumerate(room) if free >= length(example)), len(packs))
        if pack == len(packs):
            packs.append([])
            room.append(tokens)
        packs[pack].append(example)
        room[pack] -= length(example)
    return packs
