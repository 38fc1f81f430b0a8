"""Compare a call with what its row's `tools` declare: its name, and its arguments with their JSON Schema.

Null, which table formats fill in, is as good as nothing where a schema does not name it.
"""

import json
from functools import lru_cache

from tuner.data import schema_words, tool_schemas
from tuner.data.schema_keywords import UncheckableError
from tuner.data.schema_words import SHOWN
from tuner.data.tool_schemas import KEPT
from tuner.system.console import printable


def schemas_of(tools):
    """Return {name: Schema} of a row's `tools`, OpenAI's list; None if it has none."""
    if tools is None:
        return None
    try:
        return _schemas_of(json.dumps(tools))
    except RecursionError:
        return {tool["function"]["name"]: tool_schemas.TOO_DEEP for tool in tools}


@lru_cache(KEPT)
def _schemas_of(source):
    functions = {}  # of several with the same name, the first
    for tool in json.loads(source):
        functions.setdefault(tool["function"]["name"], tool["function"].get("parameters"))
    return {name: tool_schemas.schema_of(json.dumps(parameters)) for name, parameters in functions.items()}


def schema_fault(declared):
    """Return what is wrong with the first invalid one of {name: Schema}, None if all are valid."""
    for name, schema in (declared or {}).items():
        if schema.fault:
            return f'the schema of "{printable(name)}" in "tools" is invalid: {schema.fault}; correct it'
    return None


def faults(name, arguments, declared):
    """Yield what is likely wrong with a call: the name of a function and its arguments, a dict.

    declared: {name: Schema} (schemas_of). Where it is None, null is all that is likely wrong.
    """
    shown = f'"{printable(name)}"'
    if declared is None:
        nulls = [path for path, value in tool_schemas.measure(arguments)[0] if value is None]
        yield from _null_faults(shown, nulls)
        return
    if name not in declared:
        yield f'calls {shown}, which "tools" does not declare; add it there'
        return
    try:
        found = declared[name].check(arguments)
    except UncheckableError:
        cure = "it refers to itself without end, or to nothing, or is too complex; simplify it"
        yield f'{shown} is called, but its schema in "tools" cannot be checked: {cure}'
        return
    yield from _null_faults(shown, found.nulls)
    if found.undeclared:
        cure = 'which "tools" does not declare; add it there'
        yield f"{shown} is called with {_list(found.undeclared)}, {cure}"
    if found.missing:
        yield f'{shown} is called without {_list(found.missing)}, which "tools" requires; add it'
    yield from _value_faults(shown, found.errors)


def _null_faults(shown, nulls):
    if nulls:
        cure = 'leave these out (docs/rows.md has a command), or let "tools" allow null'
        yield f"{shown} is called with null for {_list(nulls)}, as table formats fill in; {cure}"


def _value_faults(shown, errors):
    """Yield the first few errors of values, one for each place and keyword."""
    firsts = {}
    for error in errors:
        path = tuple("[]" if isinstance(key, int) else key for key in error.absolute_path)
        firsts.setdefault((path, error.validator), error)
    for (path, _), error in list(firsts.items())[:SHOWN]:
        place = f"{schema_words.dotted(path)}: " if path else ""
        value, wanted = schema_words.show(error.instance), schema_words.wants(error)
        yield f'{shown} is called with {place}{value}, but "tools" wants {wanted}; correct one of them'
    if len(firsts) > SHOWN:
        yield f'{shown} is called with {len(firsts) - SHOWN} more that "tools" does not want'


def _list(paths):
    """Return the first few of many paths, as text."""
    names = list(dict.fromkeys(map(_dotted, paths[: 4 * SHOWN])))  # those of a list's items are the same
    return schema_words.join(names)


def _dotted(path):
    keys = []
    while path:
        path, key = path
        keys.append(key)
    return schema_words.dotted(reversed(keys))
