"""Which rows train and which validate, and the order in which training rows come.

A recipe is any value with the fields named here: train_qlora.RECIPE.
"""

import json
import random
from collections import Counter

from tuner.data import chat_text, tool_call


def split_rows(rows, recipe):
    """Return (training, validation): lists of row numbers, ascending.

    recipe: seed, validation_share. Seeded, stratified by call / no call, and where there are several tools by
    the names called; equal rows stay on one side. Validation is empty where the set is too small to hold a
    row of each kind out.
    """
    kinds = {True: {}, False: {}}
    for i, row in enumerate(rows):
        kinds[chat_text.is_call(row["messages"])].setdefault(
            json.dumps(row["messages"], sort_keys=True), []
        ).append(i)
    queue = []  # groups of equal rows of both kinds, merged in proportion
    for kind, groups in kinds.items():
        groups = sorted(groups.values())
        random.Random(f"{recipe.seed} split {kind}").shuffle(groups)
        names = [names_called(rows[group[0]]["messages"]) for group in groups]
        if len(set().union(*names)) > 1:
            groups = spread(groups, names)
        queue += [((rank + 0.5) / len(groups), group) for rank, group in enumerate(groups)]
    size = round(recipe.validation_share * len(rows))
    validation = []
    for _, group in sorted(queue):
        if len(validation) + len(group) <= size:
            validation += group
    validation_kinds = {chat_text.is_call(rows[i]["messages"]) for i in validation}
    if validation_kinds != {kind for kind, groups in kinds.items() if groups}:
        validation = []
    return sorted(set(range(len(rows))) - set(validation)), sorted(validation)


def names_called(messages):
    """Return the sorted names that a row's last answer calls, malformed calls left out."""
    return tuple(sorted(call.name for call in tool_call.calls_in(messages[-1]["content"])))


def spread(items, kinds):
    """Return items so that any first part of them has its share of each kind; within a kind as they were."""
    sizes, seen, positions = Counter(kinds), Counter(), []
    for kind in kinds:
        positions.append((seen[kind] + 0.5) / sizes[kind])
        seen[kind] += 1
    order = sorted(range(len(items)), key=positions.__getitem__)
    return [items[i] for i in order]


def epoch_batches(training, epoch, recipe):
    """Return the row numbers of each step of an epoch (1, 2, …): shuffled, recipe.rows_per_step at a time."""
    order, size = list(training), recipe.rows_per_step
    random.Random(f"{recipe.seed} epoch {epoch}").shuffle(order)
    return [order[start : start + size] for start in range(0, len(order), size)]


def warmup_steps(steps, recipe):
    """Return for how many of a run's steps the learning rate rises: fewer in a short run."""
    return min(recipe.warmup_steps, int(recipe.warmup_share * steps))
