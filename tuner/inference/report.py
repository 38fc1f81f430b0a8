"""Print judged answers: the probes one by one, the rates, the calls of each tool, the rows that failed."""

from tuner.inference import gate, judging, probes, rates
from tuner.system import console

STEP_WIDTH, NAME_WIDTH, CELL_WIDTH, TOOL_WIDTH, LINE_WIDTH = 11, 15, 26, 24, 80
# Lines of the table: a step, what is counted, where it stands in the figures.
LINES = (
    ("decision", "precision", "decision", "precision"),
    ("", "recall", "decision", "recall"),
    ("", "F1", "decision", "f1"),
    ("", "false calls", "decision", "false_call_rate"),
    ("", "missed calls", "decision", "missed"),
    ("name", "right tools", "names"),
    ("arguments", "all equal", "arguments"),
    ("", "keys precision", "keys", "precision"),
    ("", "keys recall", "keys", "recall"),
    ("form", "readable", "form", "readable"),
    ("", "whole answer", "form", "whole"),
    ("", "parser lost", "form", "parser_lost"),
    ("", "text around", "form", "text_around"),
    ("", "truncated", "form", "truncated"),
    ("", "empty or cut", "form", "unfit"),
    ("all right", "precision", "right", "precision"),
    ("", "recall", "right", "recall"),
    ("", "F1", "right", "f1"),
)
FAULTS = (*rates.CALL_FAULTS, "unfit")  # of form: lines that are printed only where there are any
TOOL_HEADS = dict(  # of the columns of a tool's counts
    zip(
        rates.OF_A_TOOL,
        ("needed", "right", "wrong args", "other tool", "missed", "unread", "false"),
        strict=True,
    )
)
OTHERS_SHOWN = 10  # tools that no row needs
CALLED_SHOWN = 6  # tools called where one was due


def print_report(judgment, models, seen_lines):
    """Print a judgment of comparison.judge_all.

    models: whose answers it has, the judged one last. seen_lines: those rows' lines that were trained on.
    """
    for number, probe in enumerate(judgment["probes"], 1):
        print_probe(number, probe, models)
    data = console.one_line(str(judgment["data"]))
    figures = judgment["rows"] if judgment["gate"]["reached"]["rows"] else judgment["probe_rates"]
    title = data if figures is judgment["rows"] else "probes"
    print_rates(title, {name: figures[name] for name in models})
    if _has_tools([figures[models[-1]]]):
        print_tools(figures[models[-1]]["tools"])
        print_confusion(figures[models[-1]]["confusion"])
    notes = dict.fromkeys(seen_lines) | {row["line"]: row for row in judgment["rows"]["failing"]}
    if notes:
        print()
    for line, row in sorted(notes.items()):
        if row is None:
            print(f"{data}:{line}: seen in training, left out of the rates")
        else:
            console.print_wrapped(f"{row['step']}: {row['reason']}", f"{data}:{line}: ", "    ")
            console.print_wrapped(judging.describe_answer(row[models[-1]]), "    ", "    ")


def print_probe(number, probe, models):
    head = f"probe {number:<5}"
    if probe["pass"]:
        print(f"\n{head}{console.colorize('pass', 32)}")
    else:
        print()
        verdict = f"{head}{console.colorize('FAIL', 31)}: "
        console.print_wrapped(f"{probe['step']}: {probe['reason']}", verdict, " " * len(head))
    if probe["seen"]:
        print("  seen in training, so its result here says nothing (data leak)")
    asked = {"result" if probe["role"] == "tool" else "prompt": probe["prompt"]}
    for name, text in {**asked, **{name: probe[name] for name in ("expected", *models)}}.items():
        console.print_wrapped(text, f"  {name:<10}", " " * 12)
    if probe["deviations"]:
        print(f"  {'form':<10}{', '.join(probe['deviations'])}")


# --------------------------------------------------------------------------------------------- tables


def print_rates(title, columns):
    """Print the rates of each step, a column for each model: {name: rates.count(…)}."""

    def has(part):
        return any(part(figures) for figures in columns.values())

    left_out = {fault for fault in FAULTS if not has(lambda figures, f=fault: figures["form"][f]["part"])}
    if not _has_tools(columns.values()):
        left_out.add("names")
    if not has(lambda figures: any(rate["whole"] for rate in figures["keys"].values())):
        left_out |= {"arguments", "keys"}
    lines = []
    for step, name, *place in LINES:
        if not left_out & set(place):
            cells = [_cell(name, _at(figures, place)) for figures in columns.values()]
            lines.append((f"{step:<{STEP_WIDTH}}{name:<{NAME_WIDTH}}", cells))
    if len(title) > STEP_WIDTH + NAME_WIDTH - 2:
        title = "…" + title[-(STEP_WIDTH + NAME_WIDTH - 3) :]
    lines.insert(0, (f"{title:<{STEP_WIDTH + NAME_WIDTH}}", list(columns)))
    widths = [max(CELL_WIDTH, *map(len, cells)) for cells in zip(*(cells for _, cells in lines), strict=True)]
    print()
    for label, cells in lines:
        print(label + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
    print("in brackets: 95 % Wilson intervals; what is counted: docs/verdict.md")


def _has_tools(columns):
    """Return whether more than one tool is due or called in figures of rates.count."""
    pairs = [(due, *called) for figures in columns for due, called in figures["confusion"].items()]
    return len({name for names in pairs for name in names} - {rates.TEXT, rates.UNREADABLE}) > 1


def _at(figures, place):
    for key in place:
        figures = figures[key]
    return figures


def _cell(name, rate):
    if rate["value"] is None:
        return f"– ({rate['part']} of {rate['whole']})"
    low, high = rate["interval"]
    counts = "" if name == "F1" else f"{rate['part']} of {rate['whole']}: "
    return f"{counts}{rate['value']:.2f} ({low:.2f}–{high:.2f})"


def print_tools(tools):
    """Print how the calls of each tool went; of tools that no row needs, OTHERS_SHOWN at most."""
    others = [name for name, counts in tools.items() if not counts["needed"]]
    rest = {name: tools[name] for name in others[OTHERS_SHOWN:]}
    heads = {key: head for key, head in TOOL_HEADS.items() if head != "unread" or _total(tools, key)}
    width = LINE_WIDTH - sum(len(head) + 2 for head in heads.values())
    lines = [(console.printable(name, width - 1), tools[name]) for name in tools if name not in rest]
    if rest:
        lines.append((f"{len(rest)} others", {key: _total(rest, key) for key in heads}))
    print("\n" + f"{'tool':<{width}}" + "".join(f"  {head}" for head in heads.values()))
    for name, counts in lines:
        print(f"{name:<{width}}" + "".join(f"  {counts[key]:>{len(head)}}" for key, head in heads.items()))


def _total(tools, key):
    return sum(counts[key] for counts in tools.values())


def print_confusion(confusion):
    """Print what was called for each tool that was due: the same tool first, then what was called most."""
    width = min(TOOL_WIDTH, max(map(len, confusion)) + 2)
    print(f"\n{'due':<{width}}called")
    for due, called in confusion.items():
        ordered = sorted(called.items(), key=lambda item: (item[0] != due, -item[1]))
        texts = [f"{console.printable(name, TOOL_WIDTH)} {count}" for name, count in ordered[:CALLED_SHOWN]]
        more = len(ordered) - CALLED_SHOWN
        texts += [f"{more} others {sum(count for _, count in ordered[CALLED_SHOWN:])}"] * (more > 0)
        console.print_wrapped(", ".join(texts), f"{console.printable(due, width - 1):<{width}}", " " * width)


# ------------------------------------------------------------------------------------------- endpoint


def print_endpoint(replies, places):
    """Print how an endpoint's calls came, and how results and streaming went.

    replies: endpoint.Replies. places: where each question stands, `file:line`.
    """
    parsed, tagged = replies.parsed, replies.tagged
    _print_line("calls", f"{parsed} parsed tool_calls, {tagged} unparsed tags in text")
    if parsed and tagged:
        unparsed = [place for place, reply in zip(places, replies.replies, strict=True) if reply.tagged]
        _print_line("", f"unparsed, while others are parsed: {', '.join(unparsed)}")
    if replies.tools_refused:
        _print_line("tools", f"not declared, since the endpoint rejects them ({replies.tools_refused})")
    loop, stream = replies.loop, replies.stream
    if loop.refused:
        _print_line("results", f"refused, so the loop of calls and results breaks ({loop.refused})")
    else:
        answered = f"{loop.answered} of {loop.sent} calls given a result, and answered"
        _print_line("results", answered if loop.sent else "not tried: no question was answered by a call")
    if stream.refused:
        _print_line("streamed", f"refused ({stream.refused})")
        return
    _print_line("streamed", f"{stream.same} of {stream.asked} probes answered as when whole")
    for what, numbers in (("calls", stream.other_calls), ("text", stream.other_text)):
        if numbers:
            _print_line("", f"other {what}: {', '.join(places[number] for number in numbers)}")


def _print_line(name, text):
    console.print_wrapped(text, f"{name:<11}", " " * 11)


# -------------------------------------------------------------------------------------------- verdict


def print_verdict(name, judgment, model):
    """Print in one line what `name` passes, or where it falls short; return the exit code: 0 or 1.

    model: its key in the judgment.
    """
    result, figures = judgment["gate"], judgment["rows"][model]
    asked, reached = result["asked"], result["reached"]
    if reached["rows"] < gate.MIN_ROWS:
        data = console.one_line(judgment["data"] or probes.HELD_OUT)
        rows = (
            f"{reached['rows']} unseen rows, fewer than {gate.MIN_ROWS}"
            if judgment["data"]
            else "no such file"
        )
        print(f"rows       {data}: {rows}; judged by the probes alone")
    texts = [f"{reached['probes']['part']} of {reached['probes']['whole']} probes"]
    if asked["min_f1"] is not None:
        due = figures["decision"]["recall"]["whole"]
        texts.append(f"F1 {reached['f1']:.2f} of {due} calls")
    if asked["max_false_calls"] is not None:
        false = figures["decision"]["false_call_rate"]
        texts.append(f"{false['part']} of {false['whole']} false calls")
    text = f"passes {', '.join(texts)}" if result["passed"] else f"falls short: {'; '.join(result['short'])}"
    print(f"verdict    {name} {text}")
    return int(not result["passed"])
