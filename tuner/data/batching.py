"""Cut a step's rows into micro-batches: padded to their longest, or packed end to end."""


def length(row):
    return len(row["input_ids"])


def total_tokens(rows):
    return sum(map(length, rows))


def trained_tokens(rows):
    return sum(label != -100 for row in rows for label in row["labels"][1:])


def shard(rows, state):
    """Returns a process's rows of a step, the longest first: dealt out in turn, so all get equal work."""
    return sorted(rows, key=length, reverse=True)[state.process_index :: state.num_processes]


def group_padded(items, length, tokens):
    """Cuts items, longest first, into lists of at most `tokens` (items × longest); length(item) is in tokens.

    An item longer than that is a list of its own.
    """
    groups = []
    for item in items:
        if groups and (len(groups[-1]) + 1) * length(groups[-1][0]) <= tokens:
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def group_packed(rows, tokens):
    """Cuts rows, longest first, into lists of at most `tokens` in all, each into the first that has room.

    A row longer than that is a list of its own.
    """
    packs, room = [], []
    for row in rows:
        place = next((i for i, free in enumerate(room) if free >= length(row)), len(packs))
        if place == len(packs):
            packs.append([])
            room.append(tokens)
        packs[place].append(row)
        room[place] -= length(row)
    return packs
