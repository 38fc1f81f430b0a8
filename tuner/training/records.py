"""run.json and compare.json, read back: what is used of them is as these scripts write it, or is named."""

import json

from tuner.system.console import printable
from tuner.system.errors import UserError

WORDS = {str: "a text", int: "a whole number", float: "a number", dict: "an object", list: "a list"}
# What is read of each; anything may be missing or null. [x] is a list of x, a dict an object with these keys.
RUN = {
    "revision": str,
    "model_sha256": str,
    "data_sha256": str,
    "prompts_sha256": [str],
    "bits": int,
    "steps": int,
    "rows": {"all": int},
    "tools": [str],
    "settings": {},
    "versions": {},
}
RATE = {"part": int, "whole": int, "value": float}
RATES = {"decision": {"false_call_rate": RATE}}  # not "right", which was a number in older ones
COMPARISON = {
    "bits": int,
    "passed": int,
    "probes": [{}],
    "rows": {"tuned": RATES, "base": RATES},
    "gate": {"asked": {"min_f1": float, "max_false_calls": float}},
}


def read(path, form, cure):
    """Return the object in a JSON file, {} if there is no file; raise UserError if it is not of the form."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({printable(str(error))}); {cure}") from error
    if fault := misfit(value, form):
        raise UserError(f"{path} is damaged ({fault}); {cure}")
    return value


def misfit(value, form, name=""):
    """Return what in a value is not of the form, as `bits is "4", expected a whole number`, or None."""
    if value is None:
        return None
    kind = form if isinstance(form, type) else type(form)
    if not is_of(value, kind):
        return f"{name} is {printable(json.dumps(value, ensure_ascii=False), 30)}, expected {WORDS[kind]}"
    inner = ()
    if isinstance(form, list):
        inner = (misfit(item, form[0], f"{name}[{number}]") for number, item in enumerate(value))
    elif isinstance(form, dict):
        inner = (misfit(value.get(key), form[key], f"{name}.{key}".lstrip(".")) for key in form)
    return next(filter(None, inner), None)


def is_of(value, kind):
    if kind in (int, float):  # a bool is an int too; a number of thousands of digits, or NaN, is none here
        kinds = (int, float) if kind is float else int
        return isinstance(value, kinds) and not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, kind)
