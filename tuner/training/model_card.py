"""The README of a model or adapter. What run.json and compare.json say may be a stranger's: text here."""

import html
from contextlib import suppress

from huggingface_hub import ModelCardData

from tuner.system.console import printable

SHOWN_TOOLS = 20
# Section 3.1 of Gemma's terms asks for this sentence in a file of this name.
NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms\n"


def model_card(name, revision, run, comparison, adapter=False):
    """Return the README.md of a merged model; run and comparison are {} where nothing is known.

    name: of the base on the hub, None if it is not known; a folder's path says nothing to others.
    adapter: whether it is an adapter's, which is not merged.
    """
    library = {"library_name": "peft", "base_model_relation": "adapter"} if adapter else {}
    library = library or {"library_name": "transformers"}
    front_matter = ModelCardData(base_model=name, license="gemma", **library).to_yaml()
    base = name or "A Gemma 3 model"
    origin = f"{name or 'a Gemma 3 model'} (revision {code(revision or 'unknown')})"
    made = f"Modified from {origin}: a LoRA adapter was merged into its text model."
    if adapter:
        made = f"A LoRA adapter for the text model of {origin}, to be put on it or merged into it."
    lines = [
        "---",
        front_matter,
        "---",
        "",
        f"# {base}, tuned with QLoRA{purpose(run)}",
        "",
        f"{made} Gemma's terms of use apply: https://ai.google.dev/gemma/terms",
        "",
    ]
    for describe, record in ((describe_run, run), (describe_comparison, comparison)):
        with suppress(LookupError, TypeError, ValueError, AttributeError, RecursionError):
            lines += describe(record)  # {}, or not written by these scripts
    return "\n".join(lines) + "\n"


def purpose(run):
    """Return what a run's tools make of the title, nothing where it is not known which they are."""
    tools = run.get("tools") if isinstance(run, dict) else None
    if not isinstance(tools, list) or not tools:
        return ""
    return f" to call {code(tools[0]) if len(tools) == 1 else f'{len(tools)} tools'}"


def describe_run(run):
    """Return lines on how the adapter was trained, by its run.json."""
    settings = {k: v for k, v in run["settings"].items() if k not in ("model", "data", "output")}
    steps, bits = number(run["steps"]), number(run["bits"])
    tools = list(map(code, run.get("tools") or []))
    if len(tools) > SHOWN_TOOLS:
        tools[SHOWN_TOOLS:] = [f"and {len(tools) - SHOWN_TOOLS} more"]
    return [
        *([f"- calls: {', '.join(tools)}"] if tools else []),
        f"- settings: {code(', '.join(f'{k} {v}' for k, v in settings.items()))}",
        f"- versions: {code(', '.join(f'{k} {v}' for k, v in run['versions'].items()))}",
        f"- rows: {number(run['rows']['all'])}, sha256 of the file {code(run['data_sha256'])}",
        f"- trained: in {bits} bits, {steps} steps",
    ]


def describe_comparison(comparison):
    """Return lines on how the tuned model answered, by compare.json."""
    tuned = comparison["rows"]["tuned"]
    bits = f"in {number(comparison['bits'])} bits" if comparison["bits"] else "unquantized"
    right, false = tuned["right"]["recall"], tuned["decision"]["false_call_rate"]
    right, due, false, general = (number(rate[key]) for rate in (right, false) for key in ("part", "whole"))
    lines = [f"- probes passed, base {bits}: {number(comparison['passed'])} of {len(comparison['probes'])}"]
    if due:
        f1 = f"F1 {number(tuned['right']['f1']['value']):.2f}"
        lines.append(
            f"- held-out rows, base {bits}: {right} of {due} calls right, "
            f"{false} of {general} false calls, {f1}"
        )
    return lines


def code(value):
    """Return a value as Markdown shows it letter by letter, with no HTML and no link in it."""
    return "`" + html.escape(printable(str(value), 1000), quote=False).replace("`", "'") + "`"


def number(value):
    """Return a number; raise TypeError for anything else."""
    if type(value) not in (int, float):
        raise TypeError(f"{value!r} is no number")
    return value
