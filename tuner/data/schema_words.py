"""What a JSON Schema wants of a value, in plain words: jsonschema's errors show whole values and schemas."""

import json

from tuner.system.console import printable

SHOWN = 5  # of a list
KINDS = {
    "object": "an object",
    "array": "a list",
    "string": "a string",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "null": "null",
}
FORMATS = {
    "date": "a date such as 2026-01-31",
    "date-time": "a time such as 2026-01-31T12:00:00Z",
    "time": "a time such as 12:00:00Z",
    "email": "an e-mail address",
    "ipv4": "an IPv4 address",
    "ipv6": "an IPv6 address",
    "uuid": "a UUID",
}
LIMITS = {
    "minimum": "at least {}",
    "maximum": "at most {}",
    "exclusiveMinimum": "more than {}",
    "exclusiveMaximum": "less than {}",
    "multipleOf": "a multiple of {}",
    "minLength": "a length of at least {}",
    "maxLength": "a length of at most {}",
    "minItems": "a list of at least {}",
    "maxItems": "a list of at most {}",
    "minProperties": "an object of at least {}",
    "maxProperties": "an object of at most {}",
}
EXCLUSIVE = {
    "minimum": "exclusiveMinimum",
    "maximum": "exclusiveMaximum",
}  # which are true or false in draft 4


def wants(error):
    """Return what the schema wants where a ValidationError is, in a few words."""
    keyword, value = error.validator, error.validator_value
    if keyword in LIMITS:
        if keyword in EXCLUSIVE and error.schema.get(EXCLUSIVE[keyword]) is True:
            keyword = EXCLUSIVE[keyword]
        return LIMITS[keyword].format(show(value))
    if keyword == "type":
        return " or ".join(
            KINDS.get(kind, show(kind)) for kind in ([value] if isinstance(value, str) else value)
        )
    if keyword in ("enum", "const"):
        values = value if keyword == "enum" else [value]
        return ("one of " if len(values) > 1 else "") + join(map(show, values[: SHOWN + 1]))
    if keyword == "pattern":
        return f"what matches {printable(value)}"
    if keyword == "format":
        return FORMATS.get(value, f"the format {printable(value)}")
    if keyword == "uniqueItems":
        return "no item twice"
    if keyword is None:  # the schema `false`
        return "nothing there"
    kinds = [
        one.validator_value for one in error.context if one.validator == "type" and not one.relative_path
    ]
    if kinds and len(kinds) == len(error.context) and all(isinstance(kind, str) for kind in kinds):
        return " or ".join(KINDS.get(kind, kind) for kind in dict.fromkeys(kinds))
    if keyword in ("anyOf", "oneOf"):
        return f'what fits {"one" if error.context else "only one"} of its "{keyword}"'
    return f'what its "{keyword}" says'


def describe_invalid(errors):
    """Return what a draft forbids of a schema, of the first of its errors, and how many more there are."""
    error = next(relevant(errors[0]))
    path = ["[]" if isinstance(key, int) else key for key in error.absolute_path]
    wanted = f"one of {', '.join(map(show, KINDS))}" if path[-1:] == ["type"] else wants(error)
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{dotted(path) or 'it'} is {show(error.instance)}, but must be {wanted}{more}"


def relevant(error):
    """Yield the errors that say what is wrong: where only one branch of several was meant, those of that."""
    branches = {}
    for one in error.context or ():
        branches.setdefault(one.relative_schema_path[0], []).append(one)
    meant = [errors for errors in branches.values() if not any(map(_excludes, errors))]
    if len(meant) > 1:  # of an object, a constant tells the branches apart
        meant = [errors for errors in meant if not any(_excludes(one, depth=1) for one in errors)]
    if len(meant) == 1:
        for one in meant[0]:
            yield from relevant(one)
    else:
        yield error


def _excludes(error, depth=0):
    """Return whether an error says that a branch was not meant: its type, or its constant, is another one."""
    return len(error.relative_path) <= depth and error.validator in (
        ("const", "enum") if depth else ("type",)
    )


def show(value):
    """Return a JSON value as one short line."""
    if isinstance(value, (list, dict)) and len(value) > SHOWN:
        return f"a list of {len(value)}" if isinstance(value, list) else f"an object of {len(value)}"
    if isinstance(value, str):
        value = value[:200]  # printable shows fewer
    return printable(json.dumps(value, ensure_ascii=False, default=lambda null: None))


def join(texts, count=SHOWN):
    """Return the first `count` of some texts, with an ellipsis if there are more."""
    texts = list(texts)
    return ", ".join(texts[:count]) + ", …" * (len(texts) > count)


def dotted(path):
    """Return a path, keys with "[]" for a list's items, as a.b[].c; long ones are shortened."""
    return printable(".".join(path).replace(".[]", "[]"))
