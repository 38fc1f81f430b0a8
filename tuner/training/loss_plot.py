"""The curves of a run, as a PNG."""


def plot(history, path):
    """Draws a run's losses and the validation rows decided right over steps, and marks the kept step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(
        range(1, len(history["losses"]) + 1), history["losses"], color="tab:blue", label="training loss"
    )
    axes.set(xlabel="step", ylabel="loss (nats per trained token)", ylim=(0, None))
    evaluations = history["evaluations"]
    if evaluations:
        steps = [e["step"] for e in evaluations]
        axes.plot(steps, [e["loss"] for e in evaluations], "o-", color="tab:orange", label="validation loss")
        rows = history["rows"]["validation"]
        right = axes.twinx()
        right.plot(steps, [e["right"] for e in evaluations], "s--", color="tab:green", label="decided right")
        right.set(ylabel=f"validation rows decided right, of {rows}", ylim=(0, rows * 1.05))
        right.yaxis.get_major_locator().set_params(integer=True)
    axes.axvline(
        history["kept_step"], color="gray", linestyle=":", label=f"kept: step {history['kept_step']}"
    )
    figure.legend(loc="outside upper center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
