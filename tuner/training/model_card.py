"""The README of a merged model."""

from contextlib import suppress


def model_card(base, revision, run, comparison):
    """Returns the README.md of the merged model; run and comparison are {} where nothing is known."""
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
    for facts, found in ((run_facts, run), (comparison_facts, comparison)):
        with suppress(LookupError, TypeError, AttributeError):  # {}, or not written by these scripts
            lines += facts(found)
    return "\n".join(lines) + "\n"


def run_facts(run):
    settings = {k: v for k, v in run["settings"].items() if k not in ("model", "data", "output")}
    return [
        f"- settings: {', '.join(f'{k} {v}' for k, v in settings.items())}",
        f"- versions: {', '.join(f'{k} {v}' for k, v in run['versions'].items())}",
        f"- rows: {run['rows']['all']}, sha256 of the file {run['data_sha256']}",
        f"- trained: in {run['bits']} bits, step {run['kept_step']} of {run['steps']} kept",
    ]


def comparison_facts(comparison):
    tuned = comparison["rows"]["tuned"]
    bits = f"in {comparison['bits']} bits" if comparison["bits"] else "unquantised"
    return [
        f"- probes passed, base {bits}: {comparison['passed']} of {len(comparison['probes'])}",
        f"- held-out rows, base {bits}: {tuned['right']} of {tuned['needed']} calls right, "
        f"{tuned['false']} of {tuned['general']} false calls, F1 {tuned['f1'] or 0:.2f}",
    ]
