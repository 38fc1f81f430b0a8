"""A call's arguments beside what the row's tools declare, as JSON Schema of strangers."""

import random
import socket

import jsonschema
import pytest
import referencing

from tuner.data import tool_arguments

TEXT = {"type": "string"}
RATE = {"type": "object", "properties": {"currency": TEXT, "day": TEXT}}
NULL = (
    '"f" is called with null for {}, as table formats fill in; leave these out (docs/rows.md has a command), '
    'or let "tools" allow null'
)
UNDECLARED = '"f" is called with {}, which "tools" does not declare; add it there'
MISSING = '"f" is called without {}, which "tools" requires; add it'
WRONG = '"f" is called with {}, but "tools" wants {}; correct one of them'
INVALID = 'the schema of "f" in "tools" is invalid: {}; correct it'
TYPES = '"object", "array", "string", "integer", "number", "boolean", "null"'
UNCHECKED = (
    '"f" is called, but its schema in "tools" cannot be checked: it refers to itself without end, or to '
    "nothing, or is too complex; simplify it"
)


def warnings_of(arguments, parameters):
    """Return what is said of a call of f with these arguments, and of the schema that f has."""
    declared = tool_arguments.schemas_of([{"function": {"name": "f", "parameters": parameters}}])
    fault = tool_arguments.schema_fault(declared)
    return [*([fault] if fault else []), *tool_arguments.faults("f", arguments, declared)]


@pytest.mark.parametrize(
    ("arguments", "parameters", "says"),
    [
        ({"currency": "EUR"}, RATE, []),
        ({"currency": "EUR", "day": None, "shop": None}, RATE, [NULL.format("day, shop")]),
        ({"currency": "EUR", "shop": "Пятёрочка"}, RATE, [UNDECLARED.format("shop")]),
        ({"day": "1"}, {**RATE, "required": ["day", "currency"]}, [MISSING.format("currency")]),
        ({}, {"type": "object"}, []),
        ({}, None, []),
        ({"a": 1}, None, [UNDECLARED.format("a")]),
        ({"a": 1}, {"type": "object"}, [UNDECLARED.format("a")]),
        ({"a": 1}, {"additionalProperties": True}, []),
        ({"a": "1"}, {"patternProperties": {".*": TEXT}}, []),
        ({"a": {"b": 1}}, {"properties": {"a": {"type": "object"}}}, []),
        ({"a": [{"day": None, "b": 1}] * 9}, {"properties": {"a": {"items": RATE}}},
         [NULL.format("a[].day"), UNDECLARED.format("a[].b")]),
        ({"day": None}, {"properties": {"day": {"type": ["string", "null"]}}}, []),
        ({"day": None}, {"properties": {"day": {**TEXT, "nullable": True}}}, []),
        ({"day": None}, {"properties": {"day": {"anyOf": [TEXT, {"type": "null"}]}}}, []),
        ({"day": None}, {"properties": {"day": {"enum": ["сегодня", None]}}}, []),
        ({"day": None, "shop": 1}, {"properties": {"day": None, "shop": None}},  # schemas of a table, too
         [NULL.format("day"), UNDECLARED.format("shop")]),
        ({"a": {"x": 1, "y": None}},
         {"properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"properties": {"y": TEXT}}}},
         [NULL.format("a.y"), UNDECLARED.format("a.x")]),
        ({"a": {"a": {"a": {"b": 1}}}}, {"properties": {"a": {"$ref": "#"}}}, [UNDECLARED.format("a.a.a.b")]),
        ({"a": 1}, {"oneOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}, "required": ["b"]}]}, []),
        ({"a": "1"}, {"allOf": [{"properties": {"a": TEXT}, "required": ["c"]}]}, [MISSING.format("c")]),
        ({"a": 1, "b": 2}, {"anyOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}, []),
        ({"a": 1, "b": 2}, {"properties": {"a": {}, "b": False}}, [UNDECLARED.format("b")]),
        ({"a": {"b": 1}}, {"properties": {"a": {"unevaluatedProperties": False}}},
         [UNDECLARED.format("a.b")]),
        ({"a": None}, {"properties": {"a": TEXT}, "required": ["a"]}, [NULL.format("a")]),
        ({str(i): None for i in range(9)}, {"additionalProperties": TEXT}, [NULL.format("0, 1, 2, 3, 4, …")]),
        ({"\x1b[2J" + "к" * 99: 1}, RATE, [UNDECLARED.format("\ufffd[2J" + "к" * 55 + "…")]),
    ],
)  # fmt: skip
def test_names_are_compared_with_what_is_declared(arguments, parameters, says):
    assert warnings_of(arguments, parameters) == says


BRANCHES = [
    {"properties": {"kind": {"const": kind}, key: TEXT}, "required": ["kind", key]}
    for kind, key in (("iban", "iban"), ("card", "digits"))
]


@pytest.mark.parametrize(
    ("value", "schema", "wants"),
    [
        (1, TEXT, "a string"),
        ("1", {"type": "integer"}, "a whole number"),
        (1.5, {"type": ["integer", "null"]}, "a whole number or null"),
        (1.0, {"type": "integer"}, None),
        (True, {"type": "number"}, "a number"),
        ("loan", {"enum": ["card", "savings", 5]}, 'one of "card", "savings", 5'),
        (True, {"enum": [1, 0]}, "one of 1, 0"),
        (1.0, {"enum": [1, 0]}, None),
        (9, {"enum": list(range(9))}, "one of 0, 1, 2, 3, 4, …"),
        ("b", {"const": "a"}, '"a"'),
        ("eur", {"pattern": "^[A-Z]{3}$"}, "what matches ^[A-Z]{3}$"),
        ("Ж", {"pattern": r"^\p{L}$"}, None),  # which only the package regex reads
        ("вчера", {"format": "date"}, "a date such as 2026-01-31"),
        ("2026-02-30", {"format": "date"}, "a date such as 2026-01-31"),
        ("2026-02-03 9:00", {"format": "date-time"}, "a time such as 2026-01-31T12:00:00Z"),
        ("2026-02-03T09:00:00+03:00", {"format": "date-time"}, None),
        ("x", {"format": "uuid"}, "a UUID"),
        ("x", {"format": "unheard-of"}, None),
        (0, {"minimum": 1}, "at least 1"),
        (1, {"exclusiveMinimum": 1}, "more than 1"),
        (7, {"multipleOf": 2}, "a multiple of 2"),
        (10**400, {"multipleOf": 0.1}, None),  # no float has it
        ("", {"minLength": 1}, "a length of at least 1"),
        ([1, 2], {"maxItems": 1}, "a list of at most 1"),
        ([1, 1.0], {"uniqueItems": True}, "no item twice"),
        ([1, True, "1", [1], [True]], {"uniqueItems": True}, None),
        (5, {"not": {"type": "integer"}}, 'what its "not" says'),
        ([], {"anyOf": [TEXT, {"type": "integer"}]}, "a string or a whole number"),
        (5, {"anyOf": [{"type": "integer", "maximum": 3}, {"type": "null"}]}, "at most 3"),
        (5, {"oneOf": [{"type": "integer"}, {"type": "number"}]}, 'what fits only one of its "oneOf"'),
        ("\x1b[2J" + "к" * 99, {"type": "integer"}, "a whole number"),
    ],
)  # fmt: skip
def test_values_are_compared_with_what_the_schema_wants(value, schema, wants):
    found = warnings_of(
        {"a": [{"b": value}]}, {"properties": {"a": {"items": {"properties": {"b": schema}}}}}
    )
    if wants is None:
        assert found == []
    else:
        assert len(found) == 1
        assert found[0].startswith('"f" is called with a[].b: ')
        assert found[0].endswith(f', but "tools" wants {wants}; correct one of them')
        assert found[0].isprintable()


@pytest.mark.parametrize(
    ("arguments", "parameters", "says"),
    [
        ({"a": "x", "b": 1}, {"properties": {"a": {"type": "number"}, "b": TEXT}},
         [WRONG.format('a: "x"', "a number"), WRONG.format("b: 1", "a string")]),
        ({"a": [1, "x", 2]}, {"properties": {"a": {"items": TEXT}}}, [WRONG.format("a[]: 1", "a string")]),
        ({str(i): i for i in range(7)}, {"additionalProperties": TEXT},
         [WRONG.format(f"{i}: {i}", "a string") for i in range(5)]
         + ['"f" is called with 2 more that "tools" does not want']),
        ({"a": 1}, {"type": "string", "properties": {"a": {}}}, [WRONG.format('{"a": 1}', "a string")]),
        ({"to": {"kind": "card", "iban": "1"}}, {"properties": {"to": {"oneOf": BRANCHES}}},
         [MISSING.format("to.digits")]),
        ({"a": 3}, {"$schema": "http://json-schema.org/draft-04/schema#",
                    "properties": {"a": {"minimum": 3, "exclusiveMinimum": True}}},
         [WRONG.format("a: 3", "more than 3")]),
        ({"a": 1, "b": None}, {"properties": {"a": {"type": "string", "const": None}, "b": TEXT}},
         [NULL.format("b"), WRONG.format("a: 1", "a string")]),
    ],
)  # fmt: skip
def test_each_fault_names_place_value_and_what_is_wanted(arguments, parameters, says):
    assert warnings_of(arguments, parameters) == says


@pytest.mark.parametrize(
    ("parameters", "fault", "others"),
    [
        (True, "it is true, but must be an object", [UNDECLARED.format("a")]),
        ([], "it is [], but must be an object", [UNDECLARED.format("a")]),
        ("text", 'it is "text", but must be an object', [UNDECLARED.format("a")]),
        ({"properties": []}, "properties is [], but must be an object", [UNDECLARED.format("a")]),
        ({"properties": {"a": {"type": "float"}}},
         f'properties.a.type is "float", but must be one of {TYPES}', []),
        ({"type": "dict", "properties": {"a": TEXT}}, f'type is "dict", but must be one of {TYPES}',
         [WRONG.format("a: 1", "a string")]),
        ({"properties": {"a": {**TEXT, "required": True}}},
         "properties.a.required is true, but must be a list",
         [WRONG.format("a: 1", "a string")]),
        ({"properties": {"a": "a city"}},
         'properties.a is "a city", but must be an object or true or false', []),
        ({"properties": {"a": True}, "required": [5, {}], "anyOf": {}},
         "anyOf is {}, but must be a list (and 2 more)", []),
        ({"properties": [], "required": 5, "type": {}, "enum": 3, "allOf": [1, {}], "$ref": 7},
         "$ref is 7, but must be a string (and 5 more)", []),
        ({"$ref": "#/nope"}, 'it refers to "#/nope", which is not in it', []),
        ({"$ref": "https://elsewhere"}, 'it refers to "https://elsewhere", which is not in it', []),
        ({"properties": {"a": {"$ref": "http://["}}}, 'it refers to "http://[", which is not in it', []),
        ({"properties": {"a": {"$ref": "#/properties/a/default"}, "b": TEXT}},
         'it refers to "#/properties/a/default", which is not in it', []),
        ({"properties": {"a": {"pattern": "["}}}, 'its pattern "[" is no regular expression', []),
        ({"properties": {"a": {"pattern": "((a{999}){999}){999}"}}},
         'its pattern "((a{999}){999}){999}" is too long to match', []),
    ],
)  # fmt: skip
def test_of_an_invalid_schema_one_warning_says_so_and_the_rest_of_it_is_used(parameters, fault, others):
    assert warnings_of({"a": 1}, parameters) == [INVALID.format(fault), *others]


def nested(count, inner, key="a"):
    for _ in range(count):
        inner = {"properties": {key: inner}}
    return inner


BOMB = {f"b{i}": {"allOf": [{"$ref": f"#/$defs/b{i + 1}"}] * 2} for i in range(60)} | {"b60": {}}


@pytest.mark.parametrize(
    "parameters",
    [
        {"$ref": "#"},
        {"properties": {"a": {"anyOf": [{"$ref": "#/properties/a"}] * 3}}},
        {"properties": {"a": {"not": {"$ref": "#/properties/a"}}}},
        {"properties": {"a": {"$ref": "#/$defs/b0"}}, "$defs": BOMB},
        {"properties": {"a": {"pattern": "(a|aa)+$"}}},
    ],
)
def test_a_schema_that_is_endless_or_takes_too_long_is_given_up(parameters):
    assert warnings_of({"a": "a" * 60 + "b"}, parameters) == [UNCHECKED]
    assert warnings_of({"a": "a" * 60 + "b"}, parameters) == [UNCHECKED]


def test_one_that_is_nested_too_deeply_is_told_as_such():
    deep = INVALID.format("it is nested too deeply, or too complex to check")
    assert warnings_of({"a": 1}, nested(200, TEXT)) == [deep]
    assert warnings_of({"a": 1}, nested(5_000, TEXT)) == [INVALID.format("it is nested too deeply")]
    arguments = {}
    for _ in range(200):
        arguments = {"a": arguments}
    assert warnings_of(arguments, {"properties": {"a": {}}}) == []
    assert warnings_of(arguments, {"properties": {"a": {"$ref": "#"}}}) == [UNCHECKED]


def test_a_reference_to_what_stands_elsewhere_is_not_fetched(monkeypatch):
    def connect(*_):
        raise AssertionError("it was fetched")

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(socket.socket, "connect", connect)
    url = "https://127.0.0.1/schema.json"
    for schema in (
        {"$ref": url},
        {"$dynamicRef": url},
        {"properties": {"a": {"$id": url, "$ref": "x.json"}}},
    ):
        assert len(warnings_of({"a": 1}, schema)) == 1
    assert warnings_of({"a": 1}, {"$schema": url, "properties": {"a": {}}}) == []
    meta = {"properties": {"a": {"$ref": "http://json-schema.org/draft-07/schema#"}}}
    assert warnings_of({"a": 1}, meta) == []


def some_value(chance, depth):
    kind = chance.random() if depth else 0
    if kind < 0.5:
        return chance.choice([True, False, 0, 1, 1.0, 2.5, -3, "", "a", "EUR", "2026-01-01"])
    count = range(chance.randrange(4))
    if kind < 0.75:
        return [some_value(chance, depth - 1) for _ in count]
    return {chance.choice("abc"): some_value(chance, depth - 1) for _ in count}


def some_schema(chance, depth):
    """Return a random schema of three keywords, with schemas in them to a depth."""

    def schema():
        return chance.choice([True, False, {}]) if depth == 0 else some_schema(chance, depth - 1)

    def some(function, most=3):
        return [function() for _ in range(chance.randint(1, most))]

    def value():
        return some_value(chance, 1)

    keywords = {
        "type": lambda: chance.choice(
            ["string", "integer", "number", "object", "array", ["boolean", "string"]]
        ),
        **dict.fromkeys(("anyOf", "oneOf", "allOf", "prefixItems"), lambda: some(schema)),
        **dict.fromkeys(("items", "not", "if", "then", "contains", "propertyNames"), schema),
        **dict.fromkeys(("additionalProperties", "else"), schema),
        **dict.fromkeys(("minItems", "maxLength", "minimum", "maxProperties"), lambda: chance.randrange(3)),
        "properties": lambda: {chance.choice("abc"): schema() for _ in range(3)},
        "patternProperties": lambda: {chance.choice(["a", "^[bc]$"]): schema()},
        "dependentSchemas": lambda: {chance.choice("abc"): schema()},
        "enum": lambda: some(value),
        "const": value,
        "required": lambda: chance.sample("abc", 1),
        "dependentRequired": lambda: {"a": ["b"]},
        "uniqueItems": lambda: True,
        "pattern": lambda: chance.choice(["^[A-Z]{3}$", "a"]),
        "format": lambda: "date",
        "multipleOf": lambda: chance.choice([1, 2, 0.5]),
    }
    return {name: keywords[name]() for name in chance.sample(list(keywords), 3)}


def test_values_that_are_reported_are_those_that_jsonschema_forbids_by_itself():
    """Names are reported where it allows them, if they are not declared."""
    chance, forbidden = random.Random(0), 0
    formats, registry = jsonschema.FormatChecker(["date"]), referencing.Registry()
    for _ in range(400):
        schema = some_schema(chance, 3)
        arguments = {name: some_value(chance, 2) for name in "abc"[: chance.randrange(4)]}
        alone = jsonschema.Draft202012Validator(schema, registry=registry, format_checker=formats)
        found = warnings_of(arguments, schema)
        if not alone.is_valid(arguments):
            assert found, (schema, arguments)
            forbidden += 1
        elif found:
            assert len(found) == 1, (schema, arguments)
            assert found[0].endswith(', which "tools" does not declare; add it there'), (schema, arguments)
    assert 40 < forbidden < 360


def test_without_declaration_null_is_what_is_wrong():
    assert list(tool_arguments.faults("f", {"a": 1, "b": {"c": None}}, None)) == [NULL.format("b.c")]
    assert list(tool_arguments.faults("f", {}, tool_arguments.schemas_of([{"function": {"name": "g"}}]))) == [
        'calls "f", which "tools" does not declare; add it there'
    ]
