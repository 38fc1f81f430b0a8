"""A call's arguments beside what the row's tools declare."""

import pytest

from tuner.data import tool_arguments

TEXT = {"type": "string"}
RATE = {"type": "object", "properties": {"currency": TEXT, "day": TEXT}}
NULL = (
    '"f" is called with null for {}, as table formats fill in; leave these out (docs/rows.md has a command), '
    'or let "tools" allow null'
)
UNDECLARED = '"f" is called with {}, which "tools" does not declare; add it there'
MISSING = '"f" is called without {}, which "tools" requires; add it'


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
        ({"a": 1}, {"patternProperties": {".*": TEXT}}, []),
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
        ({"a": 1}, {"allOf": [{"properties": {"a": TEXT}, "required": ["c"]}]}, [MISSING.format("c")]),
        ({"a": 1}, {"$ref": "https://elsewhere"}, []),
        ({"a": 1}, {"properties": [], "required": 5, "type": {}, "enum": 3, "allOf": [1, {}], "$ref": 7}, []),
        ({"a": 1}, {"properties": {"a": True}, "required": [5, {}], "anyOf": {}}, []),
        ({"a": 1}, "text", [UNDECLARED.format("a")]),
        ({str(i): None for i in range(9)}, {"additionalProperties": TEXT}, [NULL.format("0, 1, 2, 3, 4, …")]),
        ({"\x1b[2J" + "к" * 99: 1}, RATE, [UNDECLARED.format("\ufffd[2J" + "к" * 55 + "…")]),
    ],
)  # fmt: skip
def test_arguments_are_compared_with_what_is_declared(arguments, parameters, says):
    assert list(tool_arguments.faults("f", arguments, {"f": parameters})) == says


def test_without_declaration_null_is_what_is_wrong():
    assert list(tool_arguments.faults("f", {"a": 1, "b": {"c": None}}, None)) == [NULL.format("b.c")]
    assert list(tool_arguments.faults("f", {}, {"g": None})) == [
        'calls "f", which "tools" does not declare; add it there'
    ]
