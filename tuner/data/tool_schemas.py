"""The parameters of a tool as JSON Schema: what is wrong with them, and what they say of a call's arguments.

jsonschema decides. But strangers write the schemas: nothing is fetched, null is as good as nothing, as table
formats fill it in, what is invalid is cut out, and time grows with the length of schemas and calls only.
"""

import json
from collections import defaultdict
from functools import cache, lru_cache
from typing import NamedTuple

import referencing
import regex
from jsonschema import validators
from referencing.jsonschema import specification_with

from tuner.data import schema_keywords, schema_words
from tuner.data.schema_keywords import Check, Null, UncheckableError

DATA = ("enum", "const", "default", "example", "examples")  # keywords whose value is no schema
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
# What may be spent on a schema, in units of about 10 µs; what one call leaves is kept for later ones.
UNITS, UNITS_PER_CALL, UNITS_PER_NODE = 1000, 300, 25
ROUNDS = 4  # in which what is no JSON Schema is cut out
KEPT = 4096  # schemas
OPEN = {"additionalProperties": True, "nullable": True}  # added where what may be there is not known
OPENED_BY = {
    *schema_keywords.BRANCHES,
    "if",
    "then",
    "else",
    "additionalProperties",
    *REFERENCES,
}  # if cut out
REGISTRY = validators.SPECIFICATIONS.combine(referencing.Registry())  # which retrieves nothing


class Findings(NamedTuple):
    """What is wrong with arguments. A path is (path of what holds it, key), with "[]" for a list's items."""

    nulls: list  # paths of those that the schema does not name
    undeclared: list  # paths
    missing: list  # paths
    errors: list  # jsonschema's, of values


@lru_cache(KEPT)
def schema_of(source):
    """Return the Schema of a tool's parameters, as JSON text."""
    return Schema(json.loads(source))


class Schema:
    """The parameters of a tool; fault: what is wrong with them, in words, None if nothing is."""

    def __init__(self, parameters):
        self.fault, self.sets, self.patterns, self.registry = None, {}, {}, REGISTRY
        if not isinstance(parameters, (dict, type(None))):
            self.fault = f"it is {schema_words.show(parameters)}, but must be an object"
        root = parameters if isinstance(parameters, dict) else {}
        draft = schema_keywords.draft_of(root)
        sizes = measure(root)[1]
        self.units = UNITS + 3 * UNITS_PER_NODE * sizes[id(root)]  # for the draft's own schema
        try:
            _simplify(root)
            self._cut_invalid(root, draft, Check(self, sizes))
            schemas = _simplify(root)
            self._cut_references(schemas, draft)
            self._cut_patterns(schemas)
        except UncheckableError:
            self.fault, root = "it is nested too deeply, or too complex to check", dict(OPEN)
        except Exception as error:  # of libraries that trust their schemas
            self.fault, root = f"it cannot be read ({type(error).__name__})", dict(OPEN)
        root.setdefault("properties", {})  # so that names are undeclared where none is declared
        self.units = UNITS + sizes.get(id(root), 0)
        self.validator = draft(root, registry=self.registry)

    def _cut_invalid(self, root, draft, check):
        """Cut out of a schema what its draft forbids, at first as little as may be; note the first fault."""
        meta = _meta_validator(draft).evolve(format_checker=check)
        for height in range(ROUNDS):
            errors = list(meta.iter_errors(root))
            if not errors:
                return
            self.fault = self.fault or schema_words.describe_invalid(errors)
            for error in errors:
                _cut(root, list(error.absolute_path), height)
        raise UncheckableError

    def _cut_references(self, schemas, draft):
        """Cut out references to what is not in the schema, or cannot be checked; note the first."""
        if any("$id" in schema for schema in schemas[1:]):
            return  # which references may start from
        users, known = defaultdict(list), set(map(id, schemas))
        for schema in schemas:
            for key in REFERENCES:
                if isinstance(schema.get(key), str):
                    users[schema[key]].append((schema, key))
        if not users:
            return
        resource = specification_with(draft.ID_OF(draft.META_SCHEMA)).create_resource(schemas[0])
        base = resource.id() or ""
        self.registry = REGISTRY.with_resource(base, resource).crawl()  # once, or each reference would
        resolver = self.registry.resolver(base)
        for reference, places in users.items():
            target = _look_up(resolver, reference)
            if id(target) in known or isinstance(target, bool):
                continue
            if reference.split("#")[0] not in REGISTRY:  # such as the meta-schema, which allows anything here
                self._note(f"it refers to {schema_words.show(reference)}, which is not in it")
            for schema, key in places:
                del schema[key]
                schema.update(OPEN)

    def _cut_patterns(self, schemas):
        """Cut out what is no pattern, or takes too long; note the first."""
        for schema in schemas:
            named = schema.get("patternProperties")
            patterns = [(named, key) for key in named] if isinstance(named, dict) else []
            patterns += [(schema, "pattern")] if isinstance(schema.get("pattern"), str) else []
            for holder, key in patterns:
                pattern = key if holder is named else schema[key]
                try:
                    self.patterns[pattern] = schema_keywords.compile_pattern(pattern)
                except (regex.error, UncheckableError, RecursionError) as error:
                    what = "no regular expression" if isinstance(error, regex.error) else "too long to match"
                    self._note(f"its pattern {schema_words.show(pattern)} is {what}")
                    del holder[key]

    def _note(self, fault):
        self.fault = self.fault or fault

    def check(self, arguments):
        """Return the Findings in a call's arguments, a dict. Raise UncheckableError."""
        try:
            nulls, measured = [], measure(arguments)
            if any(value is None for _, value in measured[0]):
                arguments = _mark_nulls(arguments)
                nodes, sizes = measure(arguments)
                self._run(arguments, sizes)
                nulls = [path for path, value in nodes if isinstance(value, Null) and not value.is_named]
                arguments = _leave_out_nulls(arguments)
                measured = measure(arguments)
            return _findings(nulls, measured[0], *self._run(arguments, measured[1]))
        except Exception:  # of a library that trusts its schemas
            raise UncheckableError from None

    def _run(self, arguments, sizes):
        """Return the names declared in each dict of arguments, by its id, and jsonschema's errors."""
        if self.units < 0:
            raise UncheckableError
        self.units += UNITS_PER_CALL + UNITS_PER_NODE * sizes[id(arguments)]
        check = Check(self, sizes)
        errors = list(self.validator.evolve(format_checker=check).iter_errors(arguments))
        return check.names, errors


def measure(value):
    """Return ([(path, value), …] of a JSON value and all in it, {id: size} of lists and dicts, in nodes)."""
    nodes, sizes = [(None, value)], {}
    for path, one in nodes:  # which grows
        if isinstance(one, dict):
            nodes += [((path, key), item) for key, item in one.items()]
        elif isinstance(one, list):
            nodes += [((path, "[]"), item) for item in one]
    for _, one in reversed(nodes):
        if isinstance(one, (dict, list)):
            items = one.values() if isinstance(one, dict) else one
            sizes[id(one)] = 1 + sum(
                sizes.get(id(item)) or 1 + schema_keywords.letters(item) for item in items
            )
    return nodes, sizes


def _mark_nulls(value):
    if isinstance(value, dict):
        return {key: _mark_nulls(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_mark_nulls(item) for item in value]
    return Null() if value is None else value


def _leave_out_nulls(value):
    """Return arguments without the nulls that the schema does not name: they have warnings of their own."""
    if isinstance(value, dict):
        pairs = ((key, _leave_out_nulls(item)) for key, item in value.items() if _is_allowed(item))
        return dict(pairs)
    return (
        [_leave_out_nulls(item) for item in value if _is_allowed(item)] if isinstance(value, list) else value
    )


def _is_allowed(value):
    return not isinstance(value, Null) or value.is_named


def _findings(nulls, nodes, names, errors):
    undeclared = []
    for path, value in nodes:
        declared = names.get(id(value)) if isinstance(value, dict) else None
        if declared is not None:
            undeclared += [(path, key) for key in value if key not in declared]
    missing, others, null = [], [], set(nulls)
    for error in (one for whole in errors for one in schema_words.relevant(whole)):
        if isinstance(error.instance, Null):
            continue
        if error.validator in ("additionalProperties", "properties", "required"):
            path = None
            for key in error.absolute_path:
                path = path, "[]" if isinstance(key, int) else key
            if error.validator == "required":
                missing += [path] * (path not in null)
            else:
                undeclared.append(path)
        else:
            others.append(error)
    return Findings(nulls, list(dict.fromkeys(undeclared)), missing, others)


@cache
def _meta_validator(draft):
    return draft(draft.META_SCHEMA, registry=REGISTRY)


def _simplify(root):
    """Leave null keywords and "$schema" out of a schema; return all schemas in it, itself first."""
    schemas = [root]
    for schema in schemas:  # which grows
        for key in [key for key, value in schema.items() if value is None or key == "$schema"]:
            if key != "const" or "type" in schema:
                del schema[key]
        for key, value in schema.items():
            if key in DATA:
                continue
            if key in NAMED and isinstance(value, dict):
                for name in [name for name, one in value.items() if one is None]:
                    del value[name]
                value = list(value.values())
            inner = value if isinstance(value, list) else [value]
            schemas += [one for one in inner if isinstance(one, dict)]
    return schemas


def _cut(root, path, height):
    """Cut what a path leads to out of a schema, or what is `height` levels above it."""
    path = path[: max(0, len(path) - height)]
    if not path:
        root.clear()
        root.update(OPEN)
        return
    holder = root
    for key in path[:-1]:
        try:
            holder = holder[key]
        except (LookupError, TypeError):
            return  # it was cut out before
    is_schema = isinstance(path[-1], int) or (len(path) > 1 and path[-2] in NAMED)
    if isinstance(holder, list) or (is_schema and not height and isinstance(holder, dict)):
        holder[path[-1]] = True
    elif isinstance(holder, dict):
        holder.pop(path[-1], None)
        holder.update(OPEN if path[-1] in OPENED_BY else {})


def _look_up(resolver, reference):
    """Return what a reference leads to, None if to nothing."""
    try:
        return resolver.lookup(reference).contents
    except (referencing.exceptions.Unresolvable, ValueError):  # of a URL that is none
        return None


TOO_DEEP = Schema({})
TOO_DEEP.fault = "it is nested too deeply"
TOO_DEEP.validator = TOO_DEEP.validator.evolve(schema=OPEN)
