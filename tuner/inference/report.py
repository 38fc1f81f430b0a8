"""Print judged answers: the probes one by one, a table of rates, the rows that failed."""

from tuner.system import console

COUNTS = {
    "needed": "calls needed",
    "right": "  made right",
    "missed": "  missed",
    "malformed": "  malformed",
    "general": "text needed",
    "false": "  false calls",
    "unfit": "  empty or truncated",
}
RATES = {
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "false_call_rate": "false-call-rate",
}


def print_report(judgment, models, seen_lines):
    """Print a judgment of judging.judge_all.

    models: whose answers it has, the judged one last. seen_lines: those rows' lines that were trained on.
    """
    for number, probe in enumerate(judgment["probes"], 1):
        print_probe(number, probe, models)
    data = console.one_line(str(judgment["data"]))
    print_table(console.printable(data, 25), {name: judgment["rows"][name] for name in models})
    notes = dict.fromkeys(seen_lines) | {row["line"]: row for row in judgment["rows"]["failing"]}
    for line, row in sorted(notes.items()):
        if row is None:
            print(f"{data}:{line}: seen in training, left out of the rates")
        else:
            console.print_wrapped(f"{row['reason']}: {row[models[-1]]}", f"{data}:{line}: ", "    ")


def print_probe(number, probe, models):
    verdict = console.colorize("pass", 32)
    if not probe["pass"]:
        verdict = f"{console.colorize('FAIL', 31)}: {probe['reason']}"
    print(f"\nprobe {number}    {verdict}")
    if probe["seen"]:
        print("  seen in training, so its result here says nothing (data leak)")
    for name in ("prompt", "expected", *models):
        console.print_wrapped(probe[name], f"  {name:<10}", " " * 12)
    if probe["deviations"]:
        print(f"  {'form':<10}{', '.join(probe['deviations'])}")


def print_table(title, columns):
    """Print counts and rates, a column for each model: {name: judging.rates(…)}."""

    def rate(figures, name):
        count, total = figures["of"][name]
        if figures[name] is None:
            return f"– ({count} of {total})"
        low, high = figures["intervals"][name]
        counts = "" if name == "f1" else f"{count} of {total}: "
        return f"{counts}{figures[name]:.2f} ({low:.2f}–{high:.2f})"

    def line(label, cells):
        print(f"{label:<26}" + "".join(f"{cell:>27}" for cell in cells))

    print()
    line(title, columns)
    for key, label in COUNTS.items():
        line(label, [figures[key] for figures in columns.values()])
    for key, label in RATES.items():
        line(label, [rate(figures, key) for figures in columns.values()])
    print("in brackets: 95 % Wilson interval")


def print_verdict(name, judgment):
    """Print how many probes `name` passes; return the exit code: 0 if all, else 1."""
    probes = len(judgment["probes"])
    print(f"verdict    {name} passes {judgment['passed']} of {probes} probe{'s' * (probes != 1)}")
    return int(judgment["passed"] < probes)
