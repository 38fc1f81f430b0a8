"""The README of a merged model."""

from contextlib import suppress


def model_card(base, revision, run, comparison):
    """Return the README.md of the merged model; run and comparison are {} where nothing is known."""
    lines = [
        "---",
        f"base_model: {base}",
        "license: gemma",
        "library_name: transformers",
        "---",
        "",
        f"# {base}, tuned with QLoRA to answer a request for personal data with a tool call",
        "",
        f"Modified from {base} (revision {revision or 'unknown'}): a LoRA adapter was merged into its text "
        "model. Gemma's terms of use apply: https://ai.google.dev/gemma/terms",
        "",
    ]
    for describe, record in ((describe_run, run), (describe_comparison, comparison)):
        with suppress(LookupError, TypeError, AttributeError):  # {}, or not written by these scripts
            lines += describe(record)
    return "\n".join(lines) + "\n"


def describe_run(run):
    """Return lines on how the adapter was trained, by its run.json."""
    settings = {k: v for k, v in run["settings"].items() if k not in ("model", "data", "output")}
    return [
        f"- settings: {', '.join(f'{k} {v}' for k, v in settings.items())}",
        f"- versions: {', '.join(f'{k} {v}' for k, v in run['versions'].items())}",
        f"- rows: {run['rows']['all']}, sha256 of the file {run['data_sha256']}",
        f"- trained: in {run['bits']} bits, step {run['kept_step']} of {run['steps']} kept",
    ]


def describe_comparison(comparison):
    """Return lines on how the tuned model answered, by compare.json."""
    tuned = comparison["rows"]["tuned"]
    bits = f"in {comparison['bits']} bits" if comparison["bits"] else "unquantized"
    return [
        f"- probes passed, base {bits}: {comparison['passed']} of {len(comparison['probes'])}",
        f"- held-out rows, base {bits}: {tuned['right']} of {tuned['needed']} calls right, "
        f"{tuned['false']} of {tuned['general']} false calls, F1 {tuned['f1'] or 0:.2f}",
    ]
