"""Compare a call's arguments with what its row's `tools` declare: their names, and what is null.

Types and values are not compared. Strangers write the schemas: anything may stand anywhere in one, and null,
which table formats fill in, is as good as nothing.
"""

from typing import NamedTuple

from tuner.system.console import printable

SHOWN = 5  # arguments in a warning
# Of one schema: parts (allOf, anyOf, $ref, …), values of an enum, letters of a reference. A schema of more is
# taken to allow anything, so that time does not grow with values × schemas.
MAX_PARTS, MAX_VALUES, MAX_LETTERS = 100, 1000, 1000


def parameters_of(tools):
    """Return {name: parameters} of a row's `tools`, OpenAI's list; None if it has none."""
    if tools is None:
        return None
    return {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}


def faults(name, arguments, declared):
    """Yield what is likely wrong with a call: the name of a function and its arguments, a dict.

    declared: {name: parameters} (parameters_of). Where it is None, null is all that is likely wrong.
    """
    shown = f'"{printable(name)}"'
    if declared is not None and name not in declared:
        yield f'calls {shown}, which "tools" does not declare; add it there'
        return
    root = True if declared is None else _root(declared[name])
    shapes, nulls, unknown, missing = {}, [], [], []
    queue = [(None, arguments, root)]  # a path is (path of what holds it, key)
    for path, value, schema in queue:  # which grows
        if id(schema) not in shapes:
            shapes[id(schema)] = _shape(schema, root), schema  # kept: an id lasts as long as its object
        shape = shapes[id(schema)][0]
        if value is None and not shape.is_nullable:
            nulls.append(path)
        elif isinstance(value, list):
            queue += [((path, "[]"), item, shape.items) for item in value]
        elif isinstance(value, dict):
            for key, item in value.items():
                schema = shape.schema_of(key)
                if schema is None and item is not None:
                    unknown.append((path, key))
                else:
                    queue.append(((path, key), item, True if schema is None else schema))
            missing += [(path, key) for keys in shape.required for key in _absent(keys, value)]
    if nulls:
        cure = 'leave these out (docs/rows.md has a command), or let "tools" allow null'
        yield f"{shown} is called with null for {_list(nulls)}, as table formats fill in; {cure}"
    if unknown:
        yield f'{shown} is called with {_list(unknown)}, which "tools" does not declare; add it there'
    if missing:
        yield f'{shown} is called without {_list(missing)}, which "tools" requires; add it'


def _absent(required, value):
    """Return the first name of `required` that a dict lacks, as a list of one or none."""
    for key in required:
        if not isinstance(key, str) or key not in value:
            return [key] if isinstance(key, str) else []
    return []


def _list(paths):
    """Return the first few of many paths, as text."""
    names = list(dict.fromkeys(map(_dotted, paths[: 4 * SHOWN])))  # those of a list's items are the same
    return ", ".join(names[:SHOWN]) + ", …" * (len(names) > SHOWN)


def _dotted(path):
    keys = []
    while path:
        path, key = path
        keys.append(key)
    return printable(".".join(reversed(keys)).replace(".[]", "[]"))


class _Shape(NamedTuple):
    """What a schema says of a value."""

    properties: list  # dicts, name → schema
    others: object  # the schema of properties with other names, None if there are to be none
    items: object  # the schema of a list's items
    required: list  # lists of names
    is_nullable: bool

    def schema_of(self, key):
        """Return the schema of a property, None if it is not to be there."""
        found = [schemas[key] for schemas in self.properties if schemas.get(key) is not None]
        return _either(found) if found else self.others


ANYTHING = _Shape([], True, True, [], True)
ANYTHING_BUT_NULL = ANYTHING._replace(is_nullable=False)


def _either(schemas):
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def _root(parameters):
    """Return a function's parameters as a schema; where no properties are declared, there are none."""
    schema = parameters if isinstance(parameters, dict) else {}
    return schema if isinstance(schema.get("properties"), dict) else {**schema, "properties": {}}


def _shape(schema, root):
    """Return the _Shape of a schema with all that it combines, or refers to within `root`."""
    if not isinstance(schema, dict):
        return ANYTHING_BUT_NULL
    parts, queue, seen = [], [(schema, True)], set()
    for part, is_binding in queue:  # which grows; binding is what is not one choice of several
        if not isinstance(part, dict) or id(part) in seen:
            continue
        seen.add(id(part))
        parts.append((part, is_binding))
        if part.get("$ref") is not None:
            target = _resolve(part["$ref"], root)
            if target is None:
                return ANYTHING
            queue.append((target, is_binding))
        for key in ("allOf", "anyOf", "oneOf"):
            if isinstance(part.get(key), list):
                if len(queue) + len(part[key]) > MAX_PARTS:
                    return ANYTHING
                queue += [(one, is_binding and key == "allOf") for one in part[key]]
        queue += [(part[key], False) for key in ("then", "else") if key in part]
        if len(queue) > MAX_PARTS:
            return ANYTHING
    properties = [part["properties"] for part, _ in parts if isinstance(part.get("properties"), dict)]
    more = [part.get("additionalProperties") for part, _ in parts]
    more = [schema for schema in more if schema is True or isinstance(schema, dict)]
    more += [True for part, _ in parts if part.get("patternProperties")]
    others = _either(more) if more else None if properties else True
    items = [part[key] for part, _ in parts for key in ("items", "prefixItems") if part.get(key) is not None]
    items = [{"anyOf": schemas} if isinstance(schemas, list) else schemas for schemas in items]
    required = [part["required"] for part, binds in parts if binds and isinstance(part.get("required"), list)]
    nullable = any(_allows_null(part) for part, _ in parts)
    return _Shape(properties, others, _either(items) if items else True, required, nullable)


def _allows_null(schema):
    types, values = schema.get("type"), schema.get("enum")
    types = types if isinstance(types, list) else [types]
    values = values if isinstance(values, list) else []
    many = max(len(types), len(values)) > MAX_VALUES
    return many or "null" in types or None in values or schema.get("nullable") is True


def _resolve(reference, root):
    """Return the schema that a reference such as #/$defs/day names within root, None if there is none."""
    if not isinstance(reference, str) or not reference.startswith("#") or len(reference) > MAX_LETTERS:
        return None
    schema = root
    for key in filter(None, reference[1:].split("/")):
        schema = schema.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(schema, dict) else None
    return schema
