"""The example with several tools: legal rows, both languages, values that the user says."""

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from tuner.data import chat_rows, row_warnings, tool_arguments, tool_call, tool_survey, tool_warnings

FOLDER = Path(__file__).resolve().parents[2] / "examples/bank"
TOOLS = ("get_balance", "get_exchange_rate", "find_payments", "block_card")
KINDS = (*TOOLS, "general", "two calls", "after a result")
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


@pytest.mark.parametrize(
    ("name", "arguments", "fault"),
    [
        ("get_balance", {"account": "loan"}, "'loan' is not one of ['card', 'savings', 'credit']"),
        ("get_exchange_rate", {"date": "2026-01-15"}, 'without currency, which "tools" requires'),
        ("get_exchange_rate", {"currency": "EUR", "date": "15.01.26"}, "date: '15.01.26' is not a 'date'"),
        ("find_payments", {"filter": {"min_amount": "5"}}, "filter.min_amount: '5' is not of type 'number'"),
        ("find_payments", {"filter": {}, "limit": 0}, "limit: 0 is less than the minimum of 1"),
        ("block_card", {"last_digits": "123", "reason": "lost"}, "'123' does not match"),
        ("block_card", {"last_digits": "1234", "reason": "lost", "now": "yes"}, 'with now, which "tools" do'),
    ],
)  # fmt: skip
def test_arguments_that_a_schema_forbids_are_seen(files, name, arguments, fault):
    declared = tool_arguments.schemas_of(files["rows"][0][1]["tools"])
    [found] = tool_arguments.faults(name, arguments, declared)
    assert fault in found


def test_all_calls_fit_the_schemas_of_their_tools(files):
    for name, rows in files.items():
        for line, row in rows:
            declared = tool_arguments.schemas_of(row["tools"])
            assert tuple(declared) == TOOLS
            assert not any(schema.fault for schema in declared.values())
            for _, call in calls_of(row):
                assert not list(tool_arguments.faults(call.name, call.arguments, declared)), (name, line)


def test_no_row_deserves_a_warning(files):
    judged = [(line, row["messages"][:-1]) for name in ("heldout", "probes") for line, row in files[name]]
    assert row_warnings.warnings(files["rows"], held_out=judged) == []
    tools = tool_survey.survey(files["rows"], files["heldout"], files["probes"])
    assert tool_warnings.warnings(tools, files["heldout"], files["probes"]) == []


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


def test_the_docs_say_how_many_rows_there_are_and_show_one_that_is_read(files, tmp_path):
    page = (FOLDER.parents[1] / "docs/tools.md").read_text(encoding="utf-8")
    last = sum(bool(tool_call.looks_like_call(row["messages"][-1]["content"])) for _, row in files["heldout"])
    assert f"| `heldout.jsonl` | {len(files['heldout'])}, of which {last} call last |" in page
    assert f"| `probes.jsonl` | {len(files['probes'])}, " in page
    calls = sum(bool(calls_of(row)) for _, row in files["rows"])
    assert f"| `rows.jsonl` | {len(files['rows'])}, of which {calls} call:" in page
    (tmp_path / "rows.jsonl").write_text(re.search(r'^{"messages".*}$', page, re.MULTILINE)[0])
    [(_, row)] = chat_rows.read_rows(tmp_path / "rows.jsonl")
    declared = tool_arguments.schemas_of(row["tools"])
    [(_, call)] = calls_of(row)
    assert list(tool_arguments.faults(call.name, call.arguments, declared)) == []
