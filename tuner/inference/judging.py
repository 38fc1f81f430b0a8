"""Was an answer right: a call where one is due, and only there; rates with 95 % intervals."""

import json
from statistics import NormalDist

from tuner.data import tool_call
from tuner.inference import generation
from tuner.system.console import printable

Z = NormalDist().inv_cdf(0.975)  # of a 95 % interval


def judge(answer, expected):
    """Returns (kind, reason) of an Answer where `expected` is a tool_call.Call, or None for plain text.

    Kinds where a call is needed: "right", "missed" (no trace of a call), "malformed" (a trace, and not the
    one call asked for); where text is: "right", "false" (a trace of a call), "unfit" (empty, unended).
    """
    unended = None if answer.ended else f"does not end within {generation.MAX_NEW_TOKENS} tokens"
    traced = tool_call.looks_like_call(answer.text)
    if expected is None:
        if traced:
            return "false", "a call where text is expected"
        if unended or not answer.text.strip():
            return "unfit", unended or "an empty answer"
        return "right", None
    if not traced:
        return "missed", "no call"
    call, reason = tool_call.parse(answer.text)
    if call is None or unended:
        return "malformed", reason or unended
    if call.name != expected.name:
        return "malformed", f"calls {printable(call.name)}, not {expected.name}"
    if json.dumps(call.arguments, sort_keys=True) != json.dumps(expected.arguments, sort_keys=True):
        return "malformed", "other arguments than expected"
    return "right", None


def wilson(part, whole):
    """Returns the 95 % Wilson score interval (low, high) of a proportion (Wilson 1927); whole ≥ 1."""
    share = part / whole
    centre = share + Z**2 / (2 * whole)
    half = Z * (share * (1 - share) / whole + Z**2 / (4 * whole**2)) ** 0.5
    return max(0.0, (centre - half) / (1 + Z**2 / whole)), min(1.0, (centre + half) / (1 + Z**2 / whole))


def rates(kinds, needed):
    """Returns the counts and rates of judged rows; kinds and needed (a call) are lists of equal length.

    A call made is a right, a malformed or a false one. A rate is {"part", "whole", "value", "low", "high"}
    with its 95 % Wilson interval, or has None for the last three where it is 0 of 0.
    """

    def tally(kind, need):
        return sum(k == kind and n == need for k, n in zip(kinds, needed, strict=True))

    def rate(part, whole, curve=lambda share: share):
        value, low, high = (part / whole, *wilson(part, whole)) if whole else (None,) * 3
        shares = {"value": value, "low": low, "high": high}
        return {"part": part, "whole": whole, **{k: v if v is None else curve(v) for k, v in shares.items()}}

    counts = {
        "needed": sum(needed),
        "right": tally("right", True),
        "missed": tally("missed", True),
        "malformed": tally("malformed", True),
        "general": len(needed) - sum(needed),
        "false": tally("false", False),
        "unfit": tally("unfit", False),
    }
    made = counts["right"] + counts["malformed"] + counts["false"]
    rates = {
        "precision": rate(counts["right"], made),
        "recall": rate(counts["right"], counts["needed"]),
        # F1 = 2J / (1 + J) of the Jaccard index J, which is a proportion, so J's interval carries over.
        "f1": rate(counts["right"], counts["needed"] + made - counts["right"], lambda j: 2 * j / (1 + j)),
        "false_call_rate": rate(counts["false"], counts["general"]),
    }
    return {
        **counts,
        **{name: r["value"] for name, r in rates.items()},
        "intervals": {name: [r["low"], r["high"]] for name, r in rates.items()},
        "of": {name: [r["part"], r["whole"]] for name, r in rates.items()},
    }
