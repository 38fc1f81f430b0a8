"""Count verdicts: the rates of each step with 95 % intervals, and the calls of each tool."""

from collections import Counter
from statistics import NormalDist

from tuner.inference import judging

TEXT, UNREADABLE = "text", "unreadable"  # beside tools, in the confusion table
CALL_FAULTS = ("parser_lost", "text_around", "truncated")
OF_A_TOOL = ("needed", "right", "wrong_arguments", "other_tool", "missed", "unreadable", "false")
Z = NormalDist().inv_cdf(0.975)  # of a 95 % interval


def count(verdicts, expected):
    """Return the figures of judged answers, as compare.json holds them for a model.

    verdicts: a judging.Verdict for each question; expected: a probes.Expected for each, None for text.
    """
    due = [verdict for verdict in verdicts if verdict.due]
    general = [verdict for verdict in verdicts if not verdict.due]
    called = [verdict for verdict in due if verdict.called]
    readable = [verdict for verdict in called if "parser_lost" not in verdict.faults]
    named = [verdict for verdict in readable if verdict.step != "name"]
    pairs = [pair for verdict in named for pair in verdict.pairs]
    equal = sum(judging.equal_keys(*pair) for pair in pairs)
    false = sum(verdict.called for verdict in general)
    right = sum(verdict.step is None for verdict in due)
    faults = Counter(fault for verdict in verdicts for fault in verdict.faults)
    return {
        "decision": {
            **detection(len(called), len(due), len(called) + false),
            "false_call_rate": rate(false, len(general)),
            "missed": rate(len(due) - len(called), len(due)),
        },
        "names": rate(len(named), len(readable)),
        "arguments": rate(sum(verdict.step != "arguments" for verdict in named), len(named)),
        "keys": {
            "precision": rate(equal, sum(len(made.arguments) for _, made in pairs)),
            "recall": rate(equal, sum(len(call.arguments) for call, _ in pairs)),
        },
        "form": {
            "readable": rate(len(readable), len(called)),
            "whole": rate(sum(not verdict.faults for verdict in called), len(called)),
            **{fault: rate(faults[fault], len(called)) for fault in CALL_FAULTS},
            "unfit": rate(faults["unfit"], len(general)),
        },
        "right": detection(right, len(due), len(called) + false),
        **count_calls(verdicts, expected),
    }


def count_calls(verdicts, expected):
    """Return {"tools": {tool: {one of OF_A_TOOL: calls}}, "confusion": {tool due: {tool called: calls}}}.

    In "confusion", TEXT and UNREADABLE stand beside the tools (table_name).
    """
    due = [call for need in expected if need for call in need.calls]
    tools = {call.name: dict.fromkeys(OF_A_TOOL, 0) for call in due}
    confused = Counter()  # (due, made): calls
    for verdict, need in zip(verdicts, expected, strict=True):
        for call, made in verdict.pairs:
            confused[table_name(call), table_name(made)] += 1
            _count_pair(tools, call, made)
        if verdict.pairs:
            continue
        made = UNREADABLE if verdict.called else TEXT
        for call in need.calls if need else [None]:
            confused[table_name(call), made] += 1
            if call:
                tools[call.name]["needed"] += 1
                tools[call.name]["unreadable"] += 1
    confusion = {table_name(call): {} for call in [*due, None]}
    for (call, made), count in confused.items():
        confusion[call][made] = count
    return {"tools": tools, "confusion": {call: made for call, made in confusion.items() if made}}


def _count_pair(tools, due, made):
    if due is None:
        tools.setdefault(made.name, dict.fromkeys(OF_A_TOOL, 0))["false"] += 1
        return
    tools[due.name]["needed"] += 1
    if made is None:
        kind = "missed"
    elif due.name != made.name:
        kind = "other_tool"
    else:
        kind = "right" if judging.same_call(due, made) else "wrong_arguments"
    tools[due.name][kind] += 1


def table_name(call):
    """Return what stands for a call in the confusion table, TEXT for None.

    A tool that is itself called "text" or "unreadable" stands in quotes, and one named so in more quotes.
    """
    if call is None:
        return TEXT
    return f'"{call.name}"' if call.name.strip('"') in (TEXT, UNREADABLE) else call.name


# ---------------------------------------------------------------------------------------------- rates


def rate(part, whole):
    """Return a proportion with its 95 % interval: {"part", "whole", "value", "interval": [low, high]}."""
    value = part / whole if whole else None
    return {"part": part, "whole": whole, "value": value, "interval": wilson(part, whole) if whole else None}


def wilson(count, total):
    """Return the 95 % Wilson score interval [low, high] of a proportion (Wilson 1927); total ≥ 1."""
    share = count / total
    center = share + Z**2 / (2 * total)
    half = Z * (share * (1 - share) / total + Z**2 / (4 * total**2)) ** 0.5
    return [max(0.0, (center - half) / (1 + Z**2 / total)), min(1.0, (center + half) / (1 + Z**2 / total))]


def detection(hits, due, called):
    """Return precision, recall and F1 of `hits` among the answers that are due, and those that are called."""
    f1 = rate(2 * hits, due + called)
    if f1["whole"]:
        # F1 = 2J / (1 + J) of the Jaccard index J, which is a proportion, so J's interval carries over.
        f1["interval"] = [2 * j / (1 + j) for j in wilson(hits, due + called - hits)]
    return {"precision": rate(hits, called), "recall": rate(hits, due), "f1": f1}
