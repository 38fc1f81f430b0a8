"""What a run will do and take, worked out and printed before it: steps, split, memory, time and price."""

from typing import NamedTuple

from tuner.data import chat_text
from tuner.data.splitting import epoch_batches, split_rows, warmup_steps
from tuner.training import cost, memory_plan


class Plan(NamedTuple):
    """What training will do."""

    training: int  # rows
    validation: list  # whether it is a call, for each validation row
    steps: int
    warmup: int  # steps
    workload: memory_plan.Workload


def plan_run(rows, counts, recipe):
    """Return the Plan for rows, [(line, row), …], with their counts (labels.count_tokens), and a recipe."""
    messages = [row for _, row in rows]
    training, validation = split_rows(messages, recipe)
    batches = epoch_batches(training, 1, recipe)
    steps = recipe.epochs * len(batches)
    lengths, trained = zip(*counts, strict=True)
    epoch = [[lengths[i] for i in batch] for batch in batches]
    workload = memory_plan.Workload(epoch, max(lengths), sum(trained), sum(lengths))
    calls = [chat_text.is_call(messages[i]["messages"]) for i in validation]
    return Plan(len(training), calls, steps, warmup_steps(steps, recipe), workload)


def warn_of_plan(plan, recipe):
    """Yield what is likely wrong about a Plan."""
    if not plan.validation:
        yield "too few rows for a validation set: no evaluation"
    elif len(set(plan.validation)) < 2:
        missing = "without" if plan.validation[0] else "with"
        yield f"no validation row {missing} a call: its accuracy says nothing of that kind"
    if plan.steps < 2 * recipe.warmup_steps:
        yield f"only {plan.steps} steps, from few rows; measured: 40 and more teach the call"


def show_plan(plan, recipe):
    """Print tokens, split, steps, evaluations and checkpoints."""
    held_out, calls = len(plan.validation), sum(plan.validation)
    print(f"\ntokens     {plan.workload.describe()}")
    print(f"split      {plan.training} training rows, {held_out} validation rows ({calls} with a call)")
    schedule = (
        f"{recipe.epochs} epochs, batch size {recipe.rows_per_step}; warm-up {plan.warmup}, then a cosine"
    )
    print(f"steps      {plan.steps}: {schedule}")
    if plan.validation:
        print(f"evaluation {recipe.epochs} times, once per epoch")
    else:
        print("evaluation none")
    print("checkpoint each epoch, and at Ctrl-C; --resume continues from it")


def show_cost(dims, workload, price, recipe):
    """Print memory, time and price of training a base with these memory_plan.Dimensions."""
    for bits in (4, 8):
        size = cost.least_memory(dims, workload, bits, recipe)
        cards = ", ".join(map(str, cost.cards_with(size)))
        fits = f"fits GPUs of {cards} GB" if cards else "fits none of the usual GPUs"
        print(f"memory     {bits} bits: {size / 2**30:.1f} GiB at least, faster with more; {fits}")
    print(f"time       from start to adapter, download not included; price at {price:g} per hour:")
    for card in cost.PUBLISHED:
        cells = []
        for bits in (4, 8):
            seconds = cost.run_seconds(dims, workload, bits, card, recipe)
            cells.append(f"{bits} bits {seconds:>6.0f} s {seconds * price / 3600:>7.2f}")
        origin = "measured" if card == cost.MEASURED_ON else "scaled from that"
        print(f"           {card:<9} {'   '.join(cells)}   {origin}")
