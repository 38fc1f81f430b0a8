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
WRONG = '"f" is called with {}; correct the call or "tools"'
INVALID = '"f" is called, but its schema in "tools" cannot be used: {}; correct it'


def warnings_of(arguments, parameters):
    """Return what is said of a call of f with these arguments, where f has these parameters."""
    declared = tool_arguments.schemas_of([{"function": {"name": "f", "parameters": parameters}}])
    return list(tool_arguments.faults("f", arguments, declared))


@pytest.mark.parametrize(
    ("arguments", "parameters", "says"),
    [
        ({"currency": "EUR"}, RATE, []),
        ({"currency": "EUR", "day": None, "shop": None}, RATE, [NULL.format("shop, day")]),
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
        ({"a": {"b": 1}}, {"properties": {"a": {"additionalProperties": False}}}, [UNDECLARED.format("a.b")]),
        ({"a": {"b": 1}}, {"properties": {"a": {"anyOf": [{"$ref": "#/$defs/A"}, {"type": "null"}]}},
                           "$defs": {"A": {"type": "object", "properties": {"c": TEXT}}}},
         [UNDECLARED.format("a.b")]),
        ({"a": None}, {"properties": {"a": TEXT}, "required": ["a"]}, [NULL.format("a")]),
        ({str(i): None for i in range(9)}, {"additionalProperties": TEXT}, [NULL.format("0, 1, 2, 3, 4, …")]),
        ({"\x1b[2J" + "к" * 99: 1}, RATE, [UNDECLARED.format("\ufffd[2J" + "к" * 55 + "…")]),
    ],
)  # fmt: skip
def test_names_are_compared_with_what_is_declared(arguments, parameters, says):
    assert warnings_of(arguments, parameters) == says


@pytest.mark.parametrize(
    ("value", "schema", "says"),
    [
        (1, TEXT, "1 is not of type 'string'"),
        ("1", {"type": "integer"}, "'1' is not of type 'integer'"),
        (1.5, {"type": ["integer", "null"]}, "1.5 is not of type 'integer', 'null'"),
        (1.0, {"type": "integer"}, None),
        (True, {"type": "number"}, "True is not of type 'number'"),
        ("loan", {"enum": ["card", 5]}, "'loan' is not one of ['card', 5]"),
        (True, {"enum": [1, 0]}, "True is not one of [1, 0]"),
        (1.0, {"enum": [1, 0]}, None),
        ("b", {"const": "a"}, "'a' was expected"),
        ("eur", {"pattern": "^[A-Z]{3}$"}, "'eur' does not match '^[A-Z]{3}$'"),
        ("вчера", {"format": "date"}, "'вчера' is not a 'date'"),
        ("2026-02-30", {"format": "date"}, "'2026-02-30' is not a 'date'"),
        ("x", {"format": "unheard-of"}, None),
        (0, {"minimum": 1}, "0 is less than the minimum of 1"),
        (7, {"multipleOf": 2}, "7 is not a multiple of 2"),
        ("", {"minLength": 1}, "'' should be non-empty"),
        ([1, 2], {"maxItems": 1}, "[1, 2] is too long"),
        ([1, 1.0], {"uniqueItems": True}, "[1, 1.0] has non-unique elements"),
        ([1, True, "1", [1], [True]], {"uniqueItems": True}, None),
        (5, {"anyOf": [{"type": "integer", "maximum": 3}, {"type": "null"}]},
         "5 is greater than the maximum of 3"),
        ("\x1b[2J" + "к" * 999, {"type": "integer"}, None),
    ],
)  # fmt: skip
def test_values_are_compared_with_what_the_schema_says(value, schema, says):
    found = warnings_of(
        {"a": [{"b": value}]}, {"properties": {"a": {"items": {"properties": {"b": schema}}}}}
    )
    if isinstance(value, str) and len(value) > 99:  # shortened, and what it is not does not fit any more
        [found] = found
        assert found.startswith('"f" is called with a[].b: ')
        assert len(found) < 250
        assert found.isprintable()
    else:
        assert found == ([] if says is None else [WRONG.format(f"a[].b: {says}")])


@pytest.mark.parametrize(
    ("arguments", "parameters", "says"),
    [
        ({"a": "x", "b": 1}, {"properties": {"a": {"type": "number"}, "b": TEXT}},
         [WRONG.format("a: 'x' is not of type 'number'"), WRONG.format("b: 1 is not of type 'string'")]),
        ({"a": [1, "x", 1]}, {"properties": {"a": {"items": TEXT}}},
         [WRONG.format("a[]: 1 is not of type 'string'")]),
        ({str(i): i for i in range(7)}, {"additionalProperties": TEXT},
         [WRONG.format(f"{i}: {i} is not of type 'string'") for i in range(5)]),
        ({"a": 1}, {"type": "string", "properties": {"a": {}}},
         [WRONG.format("{'a': 1} is not of type 'string'")]),
    ],
)  # fmt: skip
def test_each_fault_names_place_and_value_and_five_are_shown(arguments, parameters, says):
    assert warnings_of(arguments, parameters) == says


BOMB = {f"b{i}": {"allOf": [{"$ref": f"#/$defs/b{i + 1}"}] * 2} for i in range(60)} | {"b60": {}}
CIRCLE = {"properties": {"a": {"anyOf": [{"$ref": "#/properties/a"}] * 3}}}
NESTED, NOWHERE = "it is nested too deeply, or refers to itself", "it refers to what is not in it"
LONG = "it takes too long to check"


@pytest.mark.parametrize(
    ("parameters", "fault"),
    [
        (True, "it is no object"),
        ([], "[] is not of type 'object', 'boolean'"),
        ("text", "'text' is not of type 'object', 'boolean'"),
        ({"properties": []}, "properties: [] is not of type 'object'"),
        ({"properties": {"a": {"type": "float"}}}, "properties.a.type: 'float' is no type of JSON Schema"),
        ({"properties": {"a": {**TEXT, "required": True}}},
         "properties.a.required: True is not of type 'array'"),
        ({"properties": {"a": "a city"}}, "properties.a: 'a city' is not of type 'object', 'boolean'"),
        ({"$ref": "#/nope"}, NOWHERE),
        ({"$ref": "https://elsewhere"}, NOWHERE),
        ({"properties": {"a": {"pattern": "["}}}, "a pattern in it is no regular expression"),
        ({"$ref": "#"}, NESTED),
        (CIRCLE, NESTED),
        ({"if": {"$ref": "#"}, "properties": {"a": {}}}, NESTED),  # in which jsonschema by itself panics
        ({"$schema": "http://json-schema.org/draft-07/schema#", "if": {"$ref": "#"}}, NESTED),
        ({"$id": "http://[", "properties": {"a": {"$ref": "b"}}}, "it cannot be read (ValueError)"),
        ({"properties": {"a": {"$ref": "#/$defs/b0"}}, "$defs": BOMB}, LONG),
        ({"properties": {"a": {"pattern": "(a|aa)+$"}}}, LONG),
    ],
)  # fmt: skip
def test_a_schema_of_no_use_is_named_with_the_reason_each_time_it_is_called(parameters, fault):
    for _ in range(2):
        assert warnings_of({"a": "a" * 60 + "b"}, parameters) == [INVALID.format(fault)]


def nested(count, inner, key="a"):
    for _ in range(count):
        inner = {"properties": {key: inner}}
    return inner


def test_what_is_nested_too_deeply_is_told_as_such():
    for count in (31, 300, 5_000):
        assert warnings_of({"a": 1}, nested(count, TEXT)) == [INVALID.format(NESTED)]
    assert warnings_of({"a": {}}, nested(29, TEXT)) == []
    arguments = {}
    for _ in range(400):
        arguments = {"a": arguments}
    assert warnings_of(arguments, {"properties": {"a": {}}}) == []
    assert warnings_of(arguments, {"properties": {"a": {"$ref": "#"}}}) == [INVALID.format(NESTED)]


def test_a_number_that_is_no_float_ends_nothing():
    parameters = {"properties": {"a": {"multipleOf": 0.1}}}
    assert warnings_of({"a": 10**400}, parameters) == [INVALID.format("it cannot be read (OverflowError)")]


def test_a_reference_to_what_stands_elsewhere_is_not_fetched(monkeypatch):
    def connect(*_):
        raise AssertionError("it was fetched")

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(socket.socket, "connect", connect)
    url = "https://127.0.0.1/schema.json"
    for schema in (
        {"$ref": url},
        {"properties": {"a": {"$id": url, "$ref": "x.json"}}},
    ):
        assert len(warnings_of({"a": 1}, schema)) == 1
    assert warnings_of({"a": 1}, {"$schema": url, "properties": {"a": {}}}) == []


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
