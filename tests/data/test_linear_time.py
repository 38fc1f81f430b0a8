"""No text, row or file of size n takes longer than about n log n: these would take seconds by pairs."""

import time

import pytest

from tests.support.rows import call, row
from train_qlora import preprocess_function
from tuner.data import (
    chat_rows,
    chat_text,
    hidden_characters,
    json_lines,
    row_warnings,
    tool_arguments,
    tool_call,
    tool_survey,
    tool_warnings,
)

SECONDS = 2  # of this process; by pairs it is 2.5 to 60, without at most 0.5
TAG = '<tool_call arguments="{'


def warn_of(text):
    return list(row_warnings.warn_of_text(1, row(text, "да")))


def warn_of_names(rare, usual):
    """Warn of calls with names of arguments that are there once, and with some that are there ten times."""
    names = [[f"slip{i}" for i in range(rare)], *[[f"name{i}" for i in range(usual)]] * 10]
    calls = [tool_call.format_call("f", dict.fromkeys(keys, 1)) for keys in names]
    return list(row_warnings.warn_of_calls([(1, row("а", text)) for text in calls]))


def results(count):
    """Return a conversation with many calls in one turn, answered in the other order."""
    answers = [{"role": "tool", "tool_call_id": str(i), "content": "1"} for i in reversed(range(count))]
    calls = {"role": "assistant", "tool_calls": [call(str(i)) for i in range(count)]}
    return [{"role": "user", "content": "а"}, calls, *answers, {"role": "assistant", "content": "б"}]


def check_call(arguments, parameters, times=1):
    """Check a call of f, which has these parameters: a schema, or the schemas of its properties."""
    schema = parameters if "properties" in parameters else {"properties": parameters}
    for _ in range(times):
        declared = tool_arguments.schemas_of([{"function": {"name": "f", "parameters": schema}}])
        list(tool_arguments.faults("f", arguments, declared))


def survey(arguments, schema):
    """Count what a call of f has, and look for what nothing judges."""
    one = row("а", tool_call.format_call("f", arguments))
    one["tools"] = [{"function": {"name": "f", "parameters": {**schema, "$defs": BOMB}}}]
    tools = tool_survey.survey([(1, one)], [(1, one)])
    tool_survey.table(tools)
    tool_warnings.warnings(tools, [(1, one)], [])


def many_schemas(count):
    branches = [{"properties": {f"k{i}": {}}} for i in range(count)]
    check_call({"x": [{"a": None}] * count}, {"x": {"items": {"anyOf": branches}}})


def same(count, schema):
    return {f"k{i}": schema for i in range(count)}


TEXT, DEEP = {"type": "string"}, {}
for _ in range(300):
    DEEP = {"a": DEEP}
BOMB = {f"b{i}": {"allOf": [{"$ref": f"#/$defs/b{i + 1}"}] * 9} for i in range(60)} | {"b60": {}}
CIRCLE = {"anyOf": [{"$ref": "#/properties/a/items"}, {"$ref": "#/$defs/b0"}] * 9}
MIXED = [{"a": i} if i % 2 else i for i in range(9_000)]
BIG = [{"b": i} for i in range(20_000)]
SCHEMAS = {
    "values of an enum": lambda: check_call({"a": MIXED}, {"a": {"items": {"enum": MIXED[::-1]}}}),
    "unique items": lambda: check_call({"a": MIXED}, {"a": {"uniqueItems": True}}),
    "unique names": lambda: check_call({"a": 1}, {"properties": {}, "required": MIXED}),
    "undeclared names": lambda: check_call(same(100_000, 1), {"a": TEXT}),
    "names of the wrong type": lambda: check_call(same(6_000, 1), same(6_000, TEXT)),
    "required names": lambda: check_call(
        {"a": [{}] * 2_000}, {"a": {"items": {"properties": {}, "required": list(same(2_000, 1))}}}
    ),
    "references that branch": lambda: check_call(
        {"a": 1}, {"properties": {"a": {"$ref": "#/$defs/b0"}}, "$defs": BOMB}, times=100
    ),
    "references in a circle": lambda: check_call(
        {"a": 1}, {"a": {"anyOf": [{"$ref": "#/properties/a"}] * 9}}, times=100
    ),
    "references to nowhere": lambda: check_call(
        {"a": 1}, {f"k{i}": {"$ref": f"#k{i}"} for i in range(6_000)}
    ),
    "references to an anchor": lambda: check_call(
        same(2_000, 1), {"properties": same(2_000, {"$ref": "#x"}), "$defs": {"x": {"$anchor": "x"}}}
    ),
    "arguments that are nested": lambda: check_call(DEEP, {"a": {"$ref": "#"}}, times=100),
    "types that are none": lambda: check_call({"a": 1}, same(4_000, {"type": "float"})),
    "a pattern that backtracks": lambda: check_call(
        {"a": ["a" * 50 + "b"] * 1_000}, {"a": {"items": {"pattern": "^(a|aa)+$"}}}, times=100
    ),
    "a pattern that backtracks in names": lambda: check_call(
        {"a" * 50 + "b": 1}, {"properties": {}, "patternProperties": {"^(a|aa)+$": TEXT}}, times=100
    ),
    "a pattern of brackets": lambda: check_call(
        {"a": "a"}, {f"k{i}": {"pattern": "[" * (9_000 + i)} for i in range(9)}
    ),
    "a pattern that repeats": lambda: check_call({"a": "a"}, {"a": {"pattern": "(?:(?:a{999}){999}){999}"}}),
    "a pattern that repeats, with a bracket in a comment": lambda: check_call(
        {"a": "a"}, {"a": {"pattern": "(?:" * 5 + "a" + "(?#()){99}" * 5}}
    ),
    "patterns and names": lambda: check_call(
        same(2_000, 1), {"properties": {}, "patternProperties": same(2_000, TEXT)}
    ),
    "a long text with many schemas": lambda: check_call(
        {"a": "x" * 2_000_000}, {"a": {"anyOf": [{"type": "integer"}] * 3_000}}
    ),
    "a large value with many schemas": lambda: check_call(
        {"a": [BIG]}, {"a": {"allOf": [{"minItems": 2}] * 2_000}}
    ),
    "items that are looked for": lambda: check_call(
        {"a": BIG}, {"a": {"allOf": [{"contains": {"const": 1}}] * 300}}
    ),
    "names that are counted": lambda: survey(same(50_000, 1), {"properties": BOMB}),
    "values that are counted": lambda: survey({"a": MIXED * 9}, {"properties": {"a": {"items": CIRCLE}}}),
    "calls of the same tool": lambda: check_call({"a": "x"}, {"a": TEXT}, times=4_000),
}  # fmt: skip
KINDS = {
    **SCHEMAS,
    "a word of one script": lambda: warn_of("a" * 40_000),
    "a word of two scripts": lambda: warn_of("a" * 40_000 + "ж" * 40_000),
    "many words of two scripts": lambda: warn_of("aж " * 40_000),
    "hidden characters": lambda: warn_of("ж\u200b" * 400_000),
    "joiners": lambda: hidden_characters.find("👨\u200d" * 100_000),
    "combining marks": lambda: chat_text.normalize("а" + "\u0301\u0316" * 40_000),
    "turns": lambda: chat_text.answer_fingerprints(row(*["слово"] * 4_000)["messages"]),
    "names of arguments": lambda: warn_of_names(rare=2_000, usual=300),
    "long names": lambda: row_warnings.misspellings({"ab" * 20_000: 100, "ab" * 19_999: 1}),
    "prompts alike, one of them long": lambda: list(
        row_warnings.near_duplicates(["ab" * 60_000, *("ab" * i for i in range(3, 600))])
    ),
    "parts of a schema": lambda: many_schemas(5_000),
    "a long key with many values": lambda: list(
        tool_arguments.faults("f", {"k" * 100_000: [None] * 100_000}, None)
    ),
    "opening brackets": lambda: tool_call.split_text("<" * 500_000),
    "calls that are not closed": lambda: tool_call.split_text(f'{TAG}"' * 8_000),
    "arguments that are no object": lambda: tool_call.split_text(f'{TAG}"a":1e999}}' * 8_000),
    "arguments that are nested": lambda: tool_call.split_text(f'{TAG}"a":[{{' * 8_000),
    "calls without a slash": lambda: tool_call.split_text(
        '<tool_call name="f" arguments="{}">' * 8_000, True
    ),
    "calls and results": lambda: chat_rows.validate_and_render(results(4_000)),
    "lines": lambda: list(json_lines.parse_values(b'{"a":\n' * 50_000, "")),
    "elements of an array": lambda: list(json_lines.parse_values(b"[" + b"1,\n" * 200_000 + b"1]", "")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_text_takes_no_longer_than_its_length_allows(kind):
    started = time.process_time()
    KINDS[kind]()
    assert time.process_time() - started < SECONDS


def test_a_row_of_thousands_of_turns_is_tokenized_as_fast_as_one_turn_of_its_length(tokenizer):
    messages = row(*["слово"] * 6_000)["messages"]
    started = time.process_time()
    batch = preprocess_function({"messages": [messages, messages[:4]]}, tokenizer)
    assert time.process_time() - started < 2 * SECONDS
    assert len(batch["labels"][0]) > 24_000
    assert set(batch["labels"][0]) == {-100}
    assert set(batch["labels"][1]) != {-100}
