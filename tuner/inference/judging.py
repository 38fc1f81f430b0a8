"""Judge answers: a call where one is needed, and only there; rates with 95 % intervals."""

import json
from statistics import NormalDist
from typing import NamedTuple

from tuner.data import tool_call
from tuner.inference.probes import MAX_NEW_TOKENS, read_calls
from tuner.system.console import printable

Z = NormalDist().inv_cdf(0.975)  # of a 95 % interval


class Answer(NamedTuple):
    text: str
    ended: bool  # by itself, within MAX_NEW_TOKENS
    ids: list  # of its tokens, without the end token


def judge(answer, expected):
    """Return (kind, reason) of an Answer where `expected` is a probes.Expected, or None for plain text.

    Kinds where a call is needed: "right", "missed" (no trace of a call), "malformed" (a trace, and not the
    calls expected); where text is: "right", "false" (a trace of a call), "unfit" (empty, truncated).
    """
    truncated = None if answer.ended else f"truncated at {MAX_NEW_TOKENS} tokens"
    traced = tool_call.looks_like_call(answer.text)
    if expected is None:
        if traced:
            return "false", "a call where text is expected"
        if truncated or not answer.text.strip():
            return "unfit", truncated or "empty answer"
        return "right", None
    if not traced:
        return "missed", "no call"
    try:
        reason = difference(*read_calls(answer.text), expected) or truncated
    except ValueError as error:
        reason = str(error)
    return ("malformed", reason) if reason else ("right", None)


def difference(calls, words, expected):
    """Return in what an answer's calls, in any order, and words (read_calls) differ from a probes.Expected.

    None: in nothing.
    """

    def names(calls):
        return sorted(call.name for call in calls)

    def contents(calls):
        return sorted((call.name, json.dumps(call.arguments, sort_keys=True)) for call in calls)

    if not calls:
        return "no call"
    if len(calls) > len(expected.calls) == 1:
        return "several calls"
    if words and not expected.words:
        return "text around the call"
    if names(calls) != names(expected.calls):
        made, due = (printable(", ".join(names(c)), 100) for c in (calls, expected.calls))
        return f"calls {made}, not {due}"
    if contents(calls) != contents(expected.calls):
        return "arguments differ from the expected ones"
    return None


def judge_all(asked, held_out, answers, seen):
    """Return the judgment of all answers as compare.json holds it.

    asked, held_out: the Questions of the probes and of the held-out rows. answers: {"base": [Answer, …],
    "tuned": …}, one for each question, the probes' first; the last model passes or fails.
    seen: whether the model was trained on each question; such rows are left out of the rates.
    """
    judged = list(answers)[-1]
    expected = asked.expected + held_out.expected
    verdicts = {
        name: [judge(answer, need) for answer, need in zip(model_answers, expected, strict=True)]
        for name, model_answers in answers.items()
    }
    probes = []
    for i, conversation in enumerate(asked.conversations):
        kind, reason = verdicts[judged][i]
        call = tool_call.parse(answers[judged][i].text)[0]
        probes.append(
            {
                "prompt": next(m["content"] for m in reversed(conversation) if m["role"] == "user"),
                "expected": "a call" if expected[i] else "text",
                **{name: model_answers[i].text for name, model_answers in answers.items()},
                "pass": kind == "right",
                "reason": reason,
                "deviations": list(call.deviations) if call else [],
                "seen": seen[i],
            }
        )
    rows = range(len(probes), len(expected))
    unseen = [i for i in rows if not seen[i]]
    needed = [expected[i] is not None for i in unseen]
    failing = []
    for i in unseen:
        kind, reason = verdicts[judged][i]
        if kind != "right":
            line = held_out.lines[i - len(probes)]
            failing.append({"line": line, "kind": kind, "reason": reason, judged: answers[judged][i].text})
    return {
        "data": held_out.path,
        "probes": probes,
        "rows": {
            **{name: rates([verdicts[name][i][0] for i in unseen], needed) for name in answers},
            "seen_in_training": len(rows) - len(unseen),
            "failing": failing,
        },
        "passed": sum(probe["pass"] for probe in probes),
    }


def wilson(count, total):
    """Return the 95 % Wilson score interval (low, high) of a proportion (Wilson 1927); total ≥ 1."""
    share = count / total
    center = share + Z**2 / (2 * total)
    half = Z * (share * (1 - share) / total + Z**2 / (4 * total**2)) ** 0.5
    return max(0.0, (center - half) / (1 + Z**2 / total)), min(1.0, (center + half) / (1 + Z**2 / total))


def rates(kinds, needed):
    """Return the counts and rates of judged rows; kinds and needed (a call) are lists of equal length.

    A call made is a right, a malformed or a false one. A rate comes with its 95 % Wilson interval in
    "intervals" and its [count, total] in "of"; where it is 0 of 0, rate and interval are None.
    """

    def tally(kind, need):
        return sum(k == kind and n == need for k, n in zip(kinds, needed, strict=True))

    def rate(count, total, curve=lambda share: share):
        value, low, high = (count / total, *wilson(count, total)) if total else (None,) * 3
        shares = {"value": value, "low": low, "high": high}
        return {"of": [count, total], **{k: v if v is None else curve(v) for k, v in shares.items()}}

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
        "of": {name: r["of"] for name, r in rates.items()},
    }
