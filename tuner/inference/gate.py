"""What a model has to reach: all probes, and enough of the held-out rows where there are enough of them."""

MIN_F1 = 0.9  # of answers right in everything: a call of another tool, or with other arguments, is none
MAX_FALSE_CALLS = 0.1  # of the answers where text is due
MIN_ROWS = 10  # fewer unseen held-out rows say too little about a model to pass or fail it


def check(probes, rows, min_f1, max_false_calls):
    """Return what was asked and reached, as compare.json holds it under "gate".

    probes: whether each passes. rows: rates.count of the held-out rows that the model was not trained on.
    """
    f1, false_calls = rows["right"]["f1"], rows["decision"]["false_call_rate"]
    due, general = rows["decision"]["recall"]["whole"], false_calls["whole"]
    enough = due + general >= MIN_ROWS
    asked = {
        "min_f1": min_f1 if enough and due else None,
        "max_false_calls": max_false_calls if enough and general else None,
    }
    passing, short = sum(probes), []
    if passing < len(probes):
        short.append(f"{passing} of {len(probes)} probes pass")
    if asked["min_f1"] is not None and f1["value"] < min_f1:
        short.append(f"F1 {_digits(f1['value'], min_f1)} of {due} calls (at least {min_f1:g}: --min-f1)")
    if asked["max_false_calls"] is not None and false_calls["value"] > max_false_calls:
        value = _digits(false_calls["value"], max_false_calls)
        counts = f"{false_calls['part']} of {general} false calls: {value}"
        short.append(f"{counts} (at most {max_false_calls:g}: --max-false-calls)")
    return {
        "asked": asked,
        "reached": {
            "probes": {"part": passing, "whole": len(probes)},
            "f1": f1["value"],
            "false_call_rate": false_calls["value"],
            "rows": due + general,
        },
        "short": short,
        "passed": not short,
    }


def add(result, texts):
    """Add to what check returned texts about where else the model falls short."""
    result["short"] += texts
    result["passed"] = not result["short"]


def _digits(value, limit):
    """Return a value with two digits, or as many as it takes to tell it from the limit that it misses."""
    told = (round(value, 2) < limit) == (value < limit) and (round(value, 2) > limit) == (value > limit)
    return f"{value:.2f}" if told else f"{value:g}"
