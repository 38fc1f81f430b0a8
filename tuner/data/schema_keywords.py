"""jsonschema's keywords for schemas and values of strangers: each counts its cost and notes what it declares.

Where the library's own compares by pairs, shows whole schemas in its errors, or matches patterns without a
limit of time, one with the same meaning stands here.
"""

import json
import re
import time
from functools import cache

import jsonschema
import regex
from jsonschema import ValidationError, validators

OLDER_DRAFTS = ("Draft4", "Draft6", "Draft7")
META_SCHEMAS = "https://json-schema.org/draft/{}/"  # of the newer drafts, in vocabularies; not of annotations
VOCABULARIES = {
    "2019-09": ("core", "applicator", "validation", "format"),
    "2020-12": ("core", "applicator", "unevaluated", "validation", "format-annotation"),
}
DATE_TIME = r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)"
TIME = r"\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)?"
LETTERS_PER_UNIT, ITEMS_PER_UNIT, VALUES_PER_UNIT = 64, 4, 16  # of a string, a list, a keyword's list
UNITS_PER_SECOND = 100_000
BRANCHES = ("allOf", "anyOf", "oneOf")  # which hold a schema for each unit
SHOW_VALUES = (  # jsonschema's errors of these do, which costs their length
    *("minLength", "maxLength", "format", "minItems", "maxItems", "minProperties", "maxProperties"),
    *("contains", "items", "additionalItems", "dependencies", "dependentRequired"),
)
MAX_DEPTH = 150  # of keywords in keywords, of four frames each: rpds ends a program that is at Python's limit
MAX_COPIES = 10_000  # letters of a pattern; regex writes out what {9} repeats, at some 0.5 KB a letter
PATTERN_SECONDS = 0.05  # of one search
PATTERN_TOKEN = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?#[^)]*\)|\{(?P<times>\d{1,9})[^}]*\}|.", re.DOTALL
)
VERBOSE = re.compile(r"\(\?[a-zA-Z]*[xV]")  # which would have other tokens


class UncheckableError(Exception):
    """A check that takes more time than the length of schema and value allows, or cannot be done at all."""


class Null:
    """A null among arguments, of which a check finds out whether the schema names it."""

    is_named = False


class Check(jsonschema.FormatChecker):
    """What one check of a value may cost, and what it notes; jsonschema hands it on to every keyword.

    budget: has the number of `units` left, and the dicts `sets` and `patterns` to keep things in.
    sizes: {id: units} of the lists and dicts in the value.
    """

    def __init__(self, budget, sizes):
        self.budget, self.sizes, self.depth = budget, sizes, 0
        self.names = {}  # by the id of a dict in the value: its properties that are declared, None if all are
        self.checkers = _format_checkers()

    def spend(self, units):
        """Take units from the budget; raise UncheckableError if it has none."""
        self.budget.units -= units
        if self.budget.units < 0 or self.depth > MAX_DEPTH:
            raise UncheckableError

    def declare(self, instance, names):
        """Note that properties of a dict in the value are declared; None for whatever others there are."""
        known = self.names.setdefault(id(instance), set())
        if names is None:
            self.names[id(instance)] = None
        elif known is not None:
            known.update(names)

    def size_of(self, value):
        """Return about how many units it takes to read a value."""
        return self.sizes.get(id(value)) or letters(value)

    def search(self, pattern, text):
        """Return whether a text has a match of a pattern. Raise UncheckableError if it takes too long."""
        started = time.thread_time()
        try:
            if pattern not in self.budget.patterns:
                self.budget.patterns[pattern] = compile_pattern(pattern)
            return self.budget.patterns[pattern].search(text, timeout=PATTERN_SECONDS)
        except TimeoutError:
            self.budget.units = -1  # it would take as long with the next call
            raise UncheckableError from None
        finally:
            self.spend(1 + int((time.thread_time() - started) * UNITS_PER_SECOND))


def letters(value):
    """Return the length of a string in units, 0 of anything else."""
    return len(value) // LETTERS_PER_UNIT if isinstance(value, str) else 0


def compile_pattern(pattern):
    """Return a pattern, compiled. Raise UncheckableError if it is too long, regex.error if it is none."""
    if len(pattern) > MAX_COPIES or VERBOSE.search(pattern) or _count_copies(pattern) > MAX_COPIES:
        raise UncheckableError
    return regex.compile(pattern)


def _count_copies(pattern):
    """Return how many letters a pattern has if what is repeated, as in (?:ab){9}, is written out."""
    outer, total, last = [], 0, 0  # totals of the groups around, of this one, of its last part
    for token in PATTERN_TOKEN.finditer(pattern):
        if token[0] == "(":
            outer.append(total)
            total = 0
        elif token[0] == ")":
            last = total + 1
            total = last + (outer.pop() if outer else 0)
        elif token[0] == "[":  # one that is not closed, so this is no pattern
            break
        elif token["times"]:
            more = min(last * (int(token["times"]) - 1), MAX_COPIES + 1)
            total, last = total + more, last + more
        else:
            total, last = total + 1, 1
    return total + sum(outer)


@cache
def _format_checkers():
    formats = jsonschema.FormatChecker(["date", "email", "ipv4", "ipv6", "uuid"])  # which need no package
    for name, pattern in (("date-time", DATE_TIME), ("time", TIME)):
        matches = re.compile(pattern, re.ASCII).fullmatch
        formats.checks(name)(lambda value, matches=matches: not isinstance(value, str) or matches(value))
    return formats.checkers


def draft_of(schema):
    """Return jsonschema's class for the draft that a schema names, the newest if it names none."""
    named = schema.get("$schema")
    drafts = _drafts()
    return drafts.get(named.rstrip("#"), drafts[None]) if isinstance(named, str) else drafts[None]


@cache
def _drafts():
    """Return {URL: class} of all drafts since the fourth, with None for the newest."""
    drafts = {}
    for year in VOCABULARIES:
        draft = getattr(jsonschema, f"Draft{year.replace('-', '')}Validator")
        drafts[None] = drafts[META_SCHEMAS.format(year) + "schema"] = _adapt(draft, _flat_meta_schema(year))
    for name in OLDER_DRAFTS:
        draft = getattr(jsonschema, f"{name}Validator")
        drafts[draft.ID_OF(draft.META_SCHEMA).rstrip("#")] = _adapt(draft, draft.META_SCHEMA)
    return drafts


def _flat_meta_schema(year):
    """Return a meta-schema that is one schema: jsonschema's, of several, takes five times as long."""
    url = META_SCHEMAS.format(year)
    parts = [validators.SPECIFICATIONS.contents(f"{url}meta/{name}") for name in VOCABULARIES[year]]
    whole = {
        "$id": f"{url}schema",
        "type": ["object", "boolean"],
        "properties": {name: schema for part in parts for name, schema in part["properties"].items()},
        "$defs": {name: schema for part in parts for name, schema in part.get("$defs", {}).items()},
    }
    whole["properties"]["definitions"] = whole["properties"]["$defs"]
    for reference in ('"$dynamicRef": "#meta"', '"$recursiveRef": "#"'):
        whole = json.loads(json.dumps(whole).replace(reference, '"$ref": "#"'))
    return whole


def _adapt(draft, meta_schema):
    """Return a draft's class with the keywords of this module."""
    keywords = {name: KEYWORDS.get(name, keyword) for name, keyword in draft.VALIDATORS.items()}
    keywords["nullable"] = _nullable  # OpenAPI's
    keywords.pop("unevaluatedItems", None)
    is_null = draft.TYPE_CHECKER.redefine("null", lambda _, value: value is None or isinstance(value, Null))
    return validators.create(
        # Of a schema that names its draft, jsonschema would take the draft's own class.
        meta_schema={key: value for key, value in meta_schema.items() if key != "$schema"},
        validators={name: _counted(name, keyword) for name, keyword in keywords.items()},
        type_checker=is_null,
        id_of=draft.ID_OF,
        applicable_validators=draft._APPLICABLE_VALIDATORS,
    )


def _counted(name, keyword):
    """Return a keyword that takes from the budget what it costs."""
    shows_value = name in SHOW_VALUES

    def check(validator, value, instance, schema):
        limits, units = validator.format_checker, 1
        if isinstance(value, (list, dict)) and name != "enum":
            units += len(value) // (1 if name in BRANCHES else VALUES_PER_UNIT)
        if isinstance(instance, (list, dict, str)):
            units += len(instance) // (LETTERS_PER_UNIT if isinstance(instance, str) else ITEMS_PER_UNIT)
        limits.depth += 1
        try:
            limits.spend(units)
            for error in keyword(validator, value, instance, schema) or ():
                limits.spend(1 + (limits.size_of(instance) if shows_value and not error.path else 0))
                yield error
        except ArithmeticError:  # a number that is no float
            return
        finally:
            limits.depth -= 1

    return check


def _properties(validator, schemas, instance, _):
    if not isinstance(instance, dict):
        return
    validator.format_checker.declare(instance, schemas)
    for name, schema in schemas.items():
        if name in instance and schema is False:  # for which descend would not say where
            yield ValidationError("", path=[name])
        elif name in instance:
            yield from validator.descend(instance[name], schema, path=name, schema_path=name)


def _additional_properties(validator, others, instance, schema):
    if not isinstance(instance, dict):
        return
    if others is not False:
        validator.format_checker.declare(instance, None)
    names, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    for key, value in instance.items():
        if key in names or any(validator.format_checker.search(pattern, key) for pattern in patterns):
            continue
        if others is False:
            yield ValidationError("", path=[key])
        else:
            yield from validator.descend(value, others, path=key)


def _unevaluated_properties(validator, others, instance, _):
    """Note whether others are declared; what is not is found as additionalProperties does."""
    if isinstance(instance, dict):
        validator.format_checker.declare(instance, () if others is False else None)
    return ()


def _pattern_properties(validator, patterns, instance, _):
    if not isinstance(instance, dict):
        return
    validator.format_checker.declare(instance, None)
    for pattern, schema in patterns.items():
        for key, value in instance.items():
            if validator.format_checker.search(pattern, key):
                yield from validator.descend(value, schema, path=key, schema_path=pattern)


def _pattern(validator, pattern, instance, _):
    if isinstance(instance, str) and not validator.format_checker.search(pattern, instance):
        yield ValidationError("")


def _required(_, names, instance, __):
    if isinstance(instance, dict):
        yield from (ValidationError("", path=[name]) for name in names if name not in instance)


def _type(validator, types, instance, _):
    types = [types] if isinstance(types, str) else types
    if isinstance(instance, Null) and "null" in types:
        instance.is_named = True
    if not any(validator.is_type(instance, one) for one in types):
        yield ValidationError("")


def _enum(validator, values, instance, _):
    sets = validator.format_checker.budget.sets
    if id(values) not in sets:
        sets[id(values)] = set(map(key_of, values))
    validator.format_checker.spend(validator.format_checker.size_of(instance))
    if key_of(instance) not in sets[id(values)]:
        yield ValidationError("")
    elif isinstance(instance, Null):
        instance.is_named = True


def _const(validator, value, instance, _):
    validator.format_checker.spend(validator.format_checker.size_of(instance))
    if key_of(instance) != key_of(value):
        yield ValidationError("")
    elif isinstance(instance, Null):
        instance.is_named = True


def _nullable(_, value, instance, __):
    if value is True and isinstance(instance, Null):
        instance.is_named = True


def _unique_items(validator, is_asked, instance, _):
    if is_asked and isinstance(instance, list):
        validator.format_checker.spend(validator.format_checker.size_of(instance))
        if len(set(map(key_of, instance))) < len(instance):
            yield ValidationError("")


def _any_of(validator, schemas, instance, _):
    """Check all branches, so that each notes what it declares."""
    branches = _branches(validator, schemas, instance)
    if all(branches):
        yield ValidationError("", context=[error for errors in branches for error in errors])


def _one_of(validator, schemas, instance, _):
    branches = _branches(validator, schemas, instance)
    if branches.count([]) != 1:
        yield ValidationError(
            "", context=[error for errors in branches for error in errors] if all(branches) else ()
        )


def _branches(validator, schemas, instance):
    return [list(validator.descend(instance, schema, schema_path=i)) for i, schema in enumerate(schemas)]


def _not(validator, schema, instance, _):
    if validator.evolve(schema=schema).is_valid(instance):
        yield ValidationError("")


def key_of(value):
    """Return what is equal for equal JSON values only, to be looked up: 1 is 1.0, but not true."""
    if isinstance(value, bool):
        return "bool", value
    if isinstance(value, list):
        return "list", tuple(map(key_of, value))
    if isinstance(value, dict):
        return "dict", frozenset((key, key_of(item)) for key, item in value.items())
    return None if isinstance(value, Null) else value


KEYWORDS = {
    "properties": _properties,
    "additionalProperties": _additional_properties,
    "unevaluatedProperties": _unevaluated_properties,
    "patternProperties": _pattern_properties,
    "pattern": _pattern,
    "required": _required,
    "type": _type,
    "enum": _enum,
    "const": _const,
    "uniqueItems": _unique_items,
    "anyOf": _any_of,
    "oneOf": _one_of,
    "not": _not,
}
