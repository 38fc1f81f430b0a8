"""Which rows train and which validate, and the order in which training rows come.

A recipe is any value with the fields named here: train_qlora.RECIPE.
"""

import json
import random

from tuner.data import chat_text


def split_rows(rows, recipe):
    """Return (training, validation): lists of row numbers, ascending.

    recipe: seed, validation_share. Seeded, stratified by call / no call; equal rows stay on one side.
    Validation is empty where the set is too small to hold a row of each kind out.
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


def epoch_batches(training, epoch, recipe):
    """Return the row numbers of each step of an epoch (1, 2, …): shuffled, recipe.rows_per_step at a time."""
    order, size = list(training), recipe.rows_per_step
    random.Random(f"{recipe.seed} epoch {epoch}").shuffle(order)
    return [order[start : start + size] for start in range(0, len(order), size)]


def warmup_steps(steps, recipe):
    """Return for how many of a run's steps the learning rate rises: fewer in a short run."""
    return min(recipe.warmup_steps, int(recipe.warmup_share * steps))
