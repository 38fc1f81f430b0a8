"""Compare a call with what its row's `tools` declare: its name, and its arguments with their JSON Schema.

jsonschema decides about values. Two things are OpenAI's and not its: no names are meant but those that
"properties" has; and null, which table formats fill in, is as good as nothing. Strangers write the schemas:
nothing is fetched, and one that takes too long to check is given up.
"""

import json
import re
import sys
from functools import lru_cache

import referencing
from jsonschema import Draft202012Validator, validators
from jsonschema.exceptions import best_match

from tuner.system.console import printable
from tuner.system.signals import OutOfTimeError, time_limit

SHOWN = 5  # faults of values, or names, in a warning
LETTERS = 150  # of what jsonschema says
SECONDS = 0.2  # of CPU, for one schema or one call; most take a thousandth of that
KEPT = 4096  # schemas
# Of Python's 1000 frames; where a reference is looked up at the limit itself, rpds ends the program. A schema
# in a schema takes eight.
MAX_FRAMES, MAX_NESTED = 800, 60
COMBINED = ("allOf", "anyOf", "oneOf", "if", "dependentSchemas")
OPEN = ("additionalProperties", "patternProperties", "unevaluatedProperties", *COMBINED)
REGISTRY = referencing.Registry()  # which fetches nothing
META_SCHEMA = Draft202012Validator(Draft202012Validator.META_SCHEMA)
REASONS = {  # of others it is the error's name
    OutOfTimeError: "it takes too long to check",
    RecursionError: "it is nested too deeply, or refers to itself",
    referencing.exceptions.Unresolvable: "it refers to what is not in it",
    re.error: "a pattern in it is no regular expression",
}


def _bounded(keyword):
    """Return a keyword that refers to a schema, with an end to references in a circle."""

    def check(*arguments):
        try:
            sys._getframe(MAX_FRAMES)
        except ValueError:  # there are not so many
            return keyword(*arguments)
        raise RecursionError

    return check


KEYWORDS = {name: _bounded(Draft202012Validator.VALIDATORS[name]) for name in ("$ref", "$dynamicRef")}
Validator = validators.extend(Draft202012Validator, KEYWORDS)


class Schema:
    """The parameters of a tool. fault: why arguments cannot be checked by them, None if they can.

    root: them as JSON Schema, without null keywords, and closed where OpenAI's tools mean it; {} at a fault.
    """

    def __init__(self, source):
        """source: the parameters as JSON text."""
        self.root, self.fault = {}, None
        self.attempt(self._read, source)
        formats = Draft202012Validator.FORMAT_CHECKER  # of date, email and the like
        self.validator = Validator(self.root, registry=REGISTRY, format_checker=formats)

    def _read(self, source):
        root = _without_nulls({} if source == "null" else json.loads(source))
        error = best_match(META_SCHEMA.iter_errors(root))
        if error or not isinstance(root, dict):
            self.fault = _describe(error) if error else "it is no object"
            return
        if not any(key in root for key in (*OPEN, "$ref")):
            root.setdefault("properties", {})
        _close(root, is_shared="allOf" in source)
        self.root = root

    def errors(self, arguments):
        """Return jsonschema's errors of a call's arguments; none, and a fault, if they cannot be checked."""

        def check():
            errors = [best_match([error]) for error in self.validator.iter_errors(arguments)]
            return sorted(errors, key=lambda error: list(map(str, error.absolute_path)))

        return [] if self.fault else self.attempt(check) or []

    def attempt(self, work, *arguments):
        """Return work(*arguments); None, and a `fault`, if a stranger's schema makes it fail."""
        try:
            with time_limit(SECONDS):
                return work(*arguments)
        except Exception as error:  # jsonschema trusts a schema: what is odd in one may raise anything
            found = (reason for kind, reason in REASONS.items() if isinstance(error, kind))
            self.fault = next(found, f"it cannot be read ({type(error).__name__})")


def _without_nulls(schema, depth=0):
    """Return a schema without keywords and properties of null, as table formats fill them in.

    And without "$schema": jsonschema would take that draft's validator. Raise RecursionError if it is deep.
    """
    if depth > MAX_NESTED:
        raise RecursionError
    if isinstance(schema, dict):
        if schema.get("nullable") is True and isinstance(schema.get("type"), str):  # OpenAPI's
            schema = {**schema, "type": [schema["type"], "null"]}
        kept = {key: value for key, value in schema.items() if value is not None}
        if isinstance(kept.get("$schema"), str):
            del kept["$schema"]
        return {key: _without_nulls(value, depth + 1) for key, value in kept.items()}
    return [_without_nulls(one, depth + 1) for one in schema] if isinstance(schema, list) else schema


def _close(schema, is_shared):
    """Forbid other names than those in "properties" where a schema says nothing of others.

    Not in the parts of an "allOf" or "anyOf", which may allow each other's; is_shared: whether what "$ref"
    refers to may be a part of an "allOf".
    """
    if not isinstance(schema, dict):
        return
    if "properties" in schema and not any(key in schema for key in OPEN):
        schema["additionalProperties"] = False
    inner = list(schema.get("properties", {}).values())
    inner += [schema[key] for key in ("items", "additionalProperties") if key in schema]
    if not is_shared:
        inner += [one for key in ("$defs", "definitions") for one in schema.get(key, {}).values()]
    for one in inner:
        _close(one, is_shared)


def schemas_of(tools):
    """Return {name: Schema} of a row's `tools`, OpenAI's list; None if it has none."""
    if tools is None:
        return None
    schemas = {}
    for function in (tool["function"] for tool in tools):
        if function["name"] not in schemas:
            try:
                source = json.dumps(function.get("parameters"))
            except RecursionError:
                source = "[" * (MAX_NESTED + 2) + "]" * (MAX_NESTED + 2)  # which is as bad
            schemas[function["name"]] = _schema(source)
    return schemas


_schema = lru_cache(KEPT)(Schema)


def faults(name, arguments, declared):
    """Yield what is likely wrong with a call: the name of a function and its arguments, a dict.

    declared: {name: Schema} (schemas_of). Where it is None, null is all that is likely wrong.
    """
    shown = f'"{printable(name)}"'
    if declared is not None and name not in declared:
        yield f'calls {shown}, which "tools" does not declare; add it there'
        return
    nulls, undeclared, missing, values = [], [], {}, []
    if declared is None:
        nulls = [path for path, value in nodes(arguments) if value is None]
    for error in declared[name].errors(arguments) if declared else ():
        path = tuple("[]" if isinstance(key, int) else key for key in error.absolute_path)
        if error.validator == "required":
            place = tuple(error.absolute_path)  # with an error for each name
            if place not in missing:
                missing[place] = [(*path, key) for key in error.validator_value if key not in error.instance]
        elif error.validator == "additionalProperties" and "patternProperties" not in error.schema:
            for key, value in error.instance.items():
                if key not in error.schema.get("properties", {}):
                    (nulls if value is None else undeclared).append((*path, key))
        elif error.instance is None:
            nulls.append(path)
        else:
            values.append(_describe(error))
    if declared and declared[name].fault:
        fault = declared[name].fault
        yield f'{shown} is called, but its schema in "tools" cannot be used: {fault}; correct it'
    if nulls:
        cure = 'leave these out (docs/rows.md has a command), or let "tools" allow null'
        yield f"{shown} is called with null for {_names(nulls)}, as table formats fill in; {cure}"
    if undeclared:
        yield f'{shown} is called with {_names(undeclared)}, which "tools" does not declare; add it there'
    if missing:
        names = _names([path for paths in missing.values() for path in paths])
        yield f'{shown} is called without {names}, which "tools" requires; add it'
    for value in list(dict.fromkeys(values))[:SHOWN]:
        yield f'{shown} is called with {value}; correct the call or "tools"'


def nodes(value):
    """Return [(path, value), …] of all in a JSON value; a path is a tuple of keys, "[]" for a list's."""
    found = [((), value)]
    for path, one in found:  # which grows
        pairs = one.items() if isinstance(one, dict) else []
        pairs = [("[]", item) for item in one] if isinstance(one, list) else pairs
        found += [((*path, key), item) for key, item in pairs]
    return found


def dotted(path):
    """Return a path as text: a.b[].c."""
    return printable(".".join(path).replace(".[]", "[]"))


def join(texts):
    """Return the first few of many texts."""
    return ", ".join(texts[:SHOWN]) + ", …" * (len(texts) > SHOWN)


def _names(paths):
    return join(list(dict.fromkeys(map(dotted, paths[: 4 * SHOWN]))))  # those of a list's items are the same


def _describe(error):
    """Return where an error of jsonschema's is, and what it says, as one short line."""
    path = ["[]" if isinstance(key, int) else key for key in error.absolute_path]
    message = error.message
    if path[-1:] == ["type"] and error.validator == "anyOf":  # in a schema
        message = f"{error.instance!r} is no type of JSON Schema"
    return printable(f"{dotted(path)}: {message}".removeprefix(": "), LETTERS)
