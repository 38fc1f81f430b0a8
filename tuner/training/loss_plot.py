"""The curves of a run, as a PNG."""

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def plot(history, path):
    """Draw a run's losses and its validation accuracy over steps, and mark the step whose adapter is kept."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    losses, evaluations = history["losses"], history["evaluations"]
    axes.plot(range(1, len(losses) + 1), losses, color="tab:blue", label="training loss")
    axes.set(xlabel="step", ylabel="loss (nats per trained token)", ylim=(0, None))
    if evaluations:
        steps = [e["step"] for e in evaluations]
        axes.plot(steps, [e["loss"] for e in evaluations], "o-", color="tab:orange", label="validation loss")
        rows = history["rows"]["validation"]
        right = axes.twinx()
        accuracy = [e["right"] for e in evaluations]
        right.plot(steps, accuracy, "s--", color="tab:green", label="validation accuracy (call/text)")
        right.set(ylabel=f"validation rows right, of {rows}", ylim=(0, rows * 1.05))
        right.yaxis.get_major_locator().set_params(integer=True)
    kept = history["kept_step"]
    axes.axvline(kept, color="gray", linestyle=":", label=f"best checkpoint: step {kept}")
    figure.legend(loc="outside upper center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
