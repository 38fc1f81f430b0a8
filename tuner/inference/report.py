"""Print judged answers: a table of rates with their intervals."""


def show_table(title, columns):
    """Prints the figures of each column, by its name."""

    def rate(figures, name):
        part, whole = figures["of"][name]
        if figures[name] is None:
            return f"– ({part} of {whole})"
        low, high = figures["intervals"][name]
        counts = "" if name == "f1" else f"{part} of {whole}: "
        return f"{counts}{figures[name]:.2f} ({low:.2f}–{high:.2f})"

    def line(label, cells):
        print(f"{label:<26}" + "".join(f"{cell:>27}" for cell in cells))

    print()
    line(title, columns)
    labels = {
        "needed": "calls needed",
        "right": "  made right",
        "missed": "  missed",
        "malformed": "  malformed",
    }
    labels |= {"general": "text needed", "false": "  false calls", "unfit": "  empty or unended"}
    for key, label in labels.items():
        line(label, [figures[key] for figures in columns.values()])
    for name in ("precision", "recall", "f1", "false_call_rate"):
        label = {"f1": "F1"}.get(name, name.replace("_", "-"))
        line(label, [rate(figures, name) for figures in columns.values()])
    print("in brackets: 95 % Wilson interval")
