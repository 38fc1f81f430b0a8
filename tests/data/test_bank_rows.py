"""The example with several tools: legal rows, both languages, values that the user says."""

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from tuner.data import chat_rows, row_warnings, tool_arguments, tool_call

FOLDER = Path(__file__).resolve().parents[2] / "examples/bank"
TOOLS = ("get_balance", "get_exchange_rate", "find_payments", "block_card")
KINDS = (*TOOLS, "general", "two calls", "after a result")
TYPES = {"object": dict, "string": str, "integer": int, "number": (int, float)}
COPIED = ("merchant", "last_digits", "min_amount", "limit")  # as the user writes them


@pytest.fixture(scope="module")
def files():
    """Return {name: [(line, row), …]} of the three files."""
    names = ("rows", "heldout", "probes")
    return {name: chat_rows.read_rows(FOLDER / f"{name}.jsonl") for name in names}


def calls_of(row):
    """Return [(turn, Call), …] of all answers of a row."""
    turns = [(n, m["content"]) for n, m in enumerate(row["messages"]) if m["role"] == "assistant"]
    parts = [(turn, part) for turn, text in turns for part in tool_call.split_text(text)[0]]
    return [(turn, part) for turn, part in parts if isinstance(part, tool_call.Call)]


def kinds_of(row):
    """Return those of KINDS that a row is an example of."""
    calls = calls_of(row)
    kinds = {call.name for _, call in calls} or {"general"}
    if len({turn for turn, _ in calls}) < len(calls):
        kinds.add("two calls")
    if row["messages"][-2]["role"] == "tool":
        kinds.add("after a result")
    return kinds


def said_by_user(row):
    return "\n".join(message["content"] for message in row["messages"] if message["role"] == "user")


def language_of(row):
    return "ru" if re.search("[а-яё]", said_by_user(row)) else "en"


def count_kinds(rows):
    """Return how many rows there are of each kind in each language: {(kind, language): rows}."""
    return Counter((kind, language_of(row)) for _, row in rows for kind in kinds_of(row))


def leaves(value):
    """Return [(key, value), …] of all that an object holds, at any depth."""
    pairs = []
    for key, item in value.items():
        inner = item if isinstance(item, list) else [item]
        for one in inner:
            pairs += leaves(one) if isinstance(one, dict) else [(key, one)]
    return pairs


def schema_faults(value, schema, path):
    """Yield what a schema forbids of a value, for the keywords that the example's schemas have."""
    if isinstance(value, bool) or not isinstance(value, TYPES[schema["type"]]):
        yield f"{path} is not of the type {schema['type']}"
    elif isinstance(value, dict):
        yield from (f"{path} lacks {key}" for key in schema.get("required", ()) if key not in value)
        yield from (f"{path}.{key} is not declared" for key in value if key not in schema["properties"])
        for key in value.keys() & schema["properties"].keys():
            yield from schema_faults(value[key], schema["properties"][key], f"{path}.{key}")
    elif isinstance(value, str):
        form = r"^\d{4}-\d\d-\d\d$" if schema.get("format") == "date" else schema.get("pattern", "")
        if not re.search(form, value) or value not in schema.get("enum", [value]):
            yield f"{path} may not be {value}"
    elif value < schema.get("minimum", value):
        yield f"{path} is below the minimum"


@pytest.mark.parametrize(
    ("name", "arguments", "fault"),
    [
        ("get_balance", {"account": "loan"}, "may not be loan"),
        ("get_exchange_rate", {"date": "2026-01-15"}, "lacks currency"),
        ("find_payments", {"filter": {"min_amount": "5"}}, "filter.min_amount is not of the type number"),
        ("find_payments", {"filter": {}, "limit": 0}, "limit is below the minimum"),
        ("block_card", {"last_digits": "123", "reason": "lost"}, "may not be 123"),
        ("block_card", {"last_digits": "1234", "reason": "lost", "now": "yes"}, "now is not declared"),
    ],
)
def test_arguments_that_a_schema_forbids_are_seen(files, name, arguments, fault):
    schema = tool_arguments.parameters_of(files["rows"][0][1]["tools"])[name]
    [found] = schema_faults(arguments, schema, name)
    assert found.endswith(fault)


def test_all_calls_fit_the_schemas_of_their_tools(files):
    for name, rows in files.items():
        for line, row in rows:
            schemas = tool_arguments.parameters_of(row["tools"])
            assert tuple(schemas) == TOOLS
            for _, call in calls_of(row):
                assert not list(schema_faults(call.arguments, schemas[call.name], call.name)), (name, line)


def test_no_row_deserves_a_warning(files):
    judged = [*files["heldout"], *files["probes"]]
    assert row_warnings.warnings(files["rows"], held_out=judged) == []


def test_no_row_repeats_or_nearly_repeats_one_of_another_file(files):
    rows = list(enumerate((row for rows in files.values() for _, row in rows), 1))
    assert row_warnings.warnings(rows) == []
    texts = {name: {m["content"] for _, row in rows for m in row["messages"] if m["role"] == "user"}
             for name, rows in files.items()}  # fmt: skip
    assert not texts["rows"] & texts["heldout"]
    assert not texts["probes"] & (texts["rows"] | texts["heldout"])


def test_half_of_the_rows_have_a_call_and_all_kinds_are_there_in_both_languages(files):
    for name, most, fewest in (("rows", 10, 2), ("heldout", 4, 1)):
        rows, found = files[name], count_kinds(files[name])
        for kind in KINDS:
            assert min(found[kind, "ru"], found[kind, "en"]) >= fewest, (name, kind)
            assert found[kind, "ru"] + found[kind, "en"] >= most, (name, kind)
        general = sum(kinds_of(row) == {"general"} for _, row in rows)
        assert abs(general - len(rows) / 2) <= 0.05 * len(rows)
        russian = sum(language_of(row) == "ru" for _, row in rows)
        assert 0.6 <= russian / len(rows) <= 0.72


def test_there_is_a_probe_of_each_kind(files):
    found = count_kinds(files["probes"])
    assert {kind for kind, _ in found} == set(KINDS)


def test_values_of_calls_are_what_the_user_says(files):
    for name, rows in files.items():
        for line, row in rows:
            said = said_by_user(row)
            for key, value in (leaf for _, call in calls_of(row) for leaf in leaves(call.arguments)):
                text = str(value)
                if key in COPIED:
                    assert text in said, (name, line)
                elif key in ("date", "since", "until"):
                    assert text[:4] in said, (name, line)
                    assert not re.search("сегодня|вчера|today|yesterday", said), (name, line)


def test_answers_to_results_use_them(files):
    for name, rows in files.items():
        for line, row in rows:
            messages = row["messages"]
            for message, answer in pairwise(messages):
                values = leaves(json.loads(message["content"])) if message["role"] == "tool" else []
                known = [str(value) for _, value in values if re.search(r"\d", str(value))]
                if known and answer["role"] == "assistant":
                    assert any(value in answer["content"] for value in known), (name, line)


def test_held_out_rows_ask_for_values_that_are_never_trained(files):
    """Of each argument whose values are copied or many: a model that has learned them by heart fails."""
    values = {
        name: {leaf for _, row in rows for _, call in calls_of(row) for leaf in leaves(call.arguments)}
        for name, rows in files.items()
    }
    fresh = Counter(key for key, _ in values["heldout"] - values["rows"])
    assert all(fresh[key] >= 2 for key in (*COPIED, "currency", "date", "since")), fresh
    assert {key for key, _ in values["probes"] - values["rows"]} >= {"last_digits", "merchant", "currency"}
