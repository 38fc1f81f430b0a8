"""Judge the answers of all models to probes and held-out rows: what compare.json holds (docs/verdict.md)."""

from tuner.inference import gate, judging, rates


def judge_all(probes, rows, answers, seen, asked):
    """Return the judgment of all answers.

    probes, rows: Questions. answers: {"base": [Answer, …], "tuned": …}, to the probes and then to the rows;
    the last model is the one that passes or falls short. seen: whether it was trained on each question; such
    rows are left out of the rates. asked: the least F1 and the highest false-call rate of the gate.
    """
    judged, count = list(answers)[-1], len(probes.lines)
    expected = probes.expected + rows.expected
    limits = probes.max_new_tokens + rows.max_new_tokens
    verdicts = {
        name: [judging.judge(*one) for one in zip(model_answers, expected, limits, strict=True)]
        for name, model_answers in answers.items()
    }
    unseen = [i for i in range(count, len(expected)) if not seen[i]]

    def figures(name, numbers):
        return rates.count([verdicts[name][i] for i in numbers], [expected[i] for i in numbers])

    def describe(i, line):
        verdict = verdicts[judged][i]
        return {"line": line, "step": verdict.step, "reason": verdict.reason}

    results = []
    for i, (line, conversation) in enumerate(zip(probes.lines, probes.conversations, strict=True)):
        verdict = verdicts[judged][i]
        calls = [made for _, made in verdict.pairs if made]
        results.append(
            {
                **describe(i, line),
                "prompt": conversation[-1]["content"],
                "role": conversation[-1]["role"],
                "expected": ", ".join(map(judging.describe_call, expected[i].calls))
                if expected[i]
                else "text",
                **{name: model_answers[i].text for name, model_answers in answers.items()},
                "pass": verdict.step is None,
                "deviations": sorted({deviation for call in calls for deviation in call.deviations}),
                "seen": seen[i],
            }
        )
    of_rows = {name: figures(name, unseen) for name in answers}
    passing = [result["pass"] for result in results]
    failing = [
        {**describe(i, rows.lines[i - count]), judged: answers[judged][i].text}
        for i in unseen
        if verdicts[judged][i].step
    ]
    return {
        "probes_data": probes.path,
        "data": rows.path,
        "probes": results,
        "probe_rates": {name: figures(name, range(count)) for name in answers},
        "rows": {**of_rows, "seen_in_training": len(rows.lines) - len(unseen), "failing": failing},
        "passed": sum(passing),
        "gate": gate.check(passing, of_rows[judged], *asked),
    }
