"""The curves of a run, as a PNG."""

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from tuner.training.evaluation import summary

STYLES = (("green", "s--"), ("purple", "^--"), ("red", "v--"))  # color, marker and line of each curve


def plot(history, path):
    """Draw a run's losses and what its validation rows are right in over steps.

    history: a dict as run.json has it.
    """
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    losses, evaluations = history["losses"], history["evaluations"]
    axes.plot(range(1, len(losses) + 1), losses, color="tab:blue", label="training loss")
    axes.set(xlabel="step", ylabel="loss (nats per trained token)", ylim=(0, None))
    if evaluations:
        steps = [e["step"] for e in evaluations]
        axes.plot(steps, [e["loss"] for e in evaluations], "o-", color="tab:orange", label="validation loss")
        draw_accuracy(axes.twinx(), steps, history)
    figure.legend(loc="outside upper center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw_accuracy(axes, steps, history):
    """Draw what validation rows are right in: as one curve, or decision, names and arguments apart."""
    rows = history["rows"]["validation"]
    summaries = [summary(e, rows, history["validation_calls"]) for e in history["evaluations"]]
    curves = list(zip(*summaries, strict=True))
    for curve, (color, line) in zip(curves, STYLES, strict=False):
        what, _, whole = curve[0]
        label = f"validation {what}" + (f" (of {whole})" if len(curves) > 1 else "")
        axes.plot(steps, [count for _, count, _ in curve], line, color=f"tab:{color}", label=label)
    of = f", of {rows}" if len(curves) == 1 else ""
    axes.set(ylabel=f"validation rows right{of}", ylim=(0, rows * 1.05))
    axes.yaxis.get_major_locator().set_params(integer=True)
