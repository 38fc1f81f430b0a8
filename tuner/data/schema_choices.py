"""The values of an argument whose JSON Schema names them all: those of an enum, a constant or a boolean."""

MAX_PARTS = 200  # of a schema to look into for one argument


def choices(root, path):
    """Return (whether a schema declares an argument, the values that it names, but for null).

    path: the keys that lead to it, with "[]" for a list's items. The values are None if it allows others too.
    """
    looker = _Looker(root)
    schemas = [root]
    for key in path:
        schemas = [inner for schema in schemas for inner in looker.inner(schema, key)]
    found = [looker.choices(schema) for schema in schemas]
    values = None if not found or None in found else [value for values in found for value in values]
    return bool(found), values


class _Looker:
    """Looks into a schema of a stranger: `parts` counts down how many may still be looked at."""

    def __init__(self, root):
        self.root, self.parts = root, MAX_PARTS

    def inner(self, schema, key):
        """Return the schemas of a property, or of a list's items."""
        found = []
        for part in self.combined(schema):
            if key == "[]":
                found += [part["items"]] if isinstance(part.get("items"), dict) else []
            elif isinstance(part.get("properties"), dict) and key in part["properties"]:
                found.append(part["properties"][key])
        return found

    def combined(self, schema):
        """Return a schema with all that it combines or refers to."""
        parts = [schema] if isinstance(schema, dict) else []
        for part in parts:  # which grows
            self.parts -= 1
            if self.parts < 0:
                return []
            inner = [one for key in ("allOf", "anyOf", "oneOf") for one in self.branches(part, key)]
            parts += [one for one in [*inner, self.target(part)] if isinstance(one, dict)]
        return parts

    def choices(self, schema):
        """Return the values that a schema names, None if it allows others."""
        self.parts -= 1
        if not isinstance(schema, dict) or self.parts < 0:
            return None
        if isinstance(schema.get("enum"), list):
            return [value for value in schema["enum"] if value is not None]
        if "const" in schema:
            return [schema["const"]]
        kinds = schema.get("type")
        kinds = set(kinds) if isinstance(kinds, list) else {kinds}
        if "boolean" in kinds and kinds <= {"boolean", "null"}:
            return [False, True]
        if kinds == {"null"}:
            return []
        for key in ("anyOf", "oneOf"):
            found = [self.choices(one) for one in self.branches(schema, key)]
            if found and None not in found:
                return [value for values in found for value in values]
        found = map(self.choices, [*self.branches(schema, "allOf"), self.target(schema)])
        return next((values for values in found if values is not None), None)

    def branches(self, schema, key):
        return schema[key] if isinstance(schema.get(key), list) else []

    def target(self, schema):
        """Return the schema that another refers to, as #/$defs/day, None if to none."""
        reference = schema.get("$ref")
        if not isinstance(reference, str) or not reference.startswith("#"):
            return None
        target = self.root
        for key in filter(None, reference[1:].split("/")):
            target = (
                target.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(target, dict) else None
            )
        return target
