"""Which rows are held out."""

import json

import pytest

import train_qlora
from tests.support.training import recipe, shipped_rows, turn
from tuner.data import chat_text
from tuner.data.splitting import split_rows

RECIPE = train_qlora.RECIPE


def call_row(i):
    return {"messages": [turn("user", f"мой баланс {i}"), turn("assistant", "<tool_call/>")]}


def general_row(i):
    return {"messages": [turn("user", f"привет {i}"), turn("assistant", "Здравствуйте!")]}


def test_the_split_is_a_seeded_tenth_of_both_kinds():
    rows = shipped_rows()
    training, validation = split_rows(rows, RECIPE)
    assert sorted(training + validation) == list(range(200))
    assert len(validation) == 20
    assert sum(chat_text.is_call(rows[i]["messages"]) for i in validation) == 10
    assert split_rows(rows, RECIPE) == (training, validation)


@pytest.mark.parametrize(
    ("calls", "general", "held_out"), [(90, 10, (9, 1)), (40, 40, (4, 4)), (30, 0, (3, 0))]
)
def test_the_split_keeps_the_proportion(calls, general, held_out):
    rows = [call_row(i) for i in range(calls)] + [general_row(i) for i in range(general)]
    _, validation = split_rows(rows, RECIPE)
    kinds = [chat_text.is_call(rows[i]["messages"]) for i in validation]
    assert (kinds.count(True), kinds.count(False)) == held_out


def test_the_split_of_rows_of_one_tool_stays_what_it_always_was():
    """As before there were several tools: the same rows and seed give the same adapter."""
    held_out = [1, 7, 17, 24, 27, 52, 71, 80, 82, 85, 86, 88, 100, 120, 133, 141, 160, 182, 185, 195]
    assert split_rows(shipped_rows(), RECIPE)[1] == held_out
    tag = '<tool_call name="f" arguments="{}"/>'
    forms = [
        tag,
        f"{tag}\n{tag}",
        f"Да.\n{tag}",
        "<tool_call/>",
        tag.replace("{}", "{&quot;x&quot;: 1}"),
        "Нет",
    ]
    rows = [
        {"messages": [turn("user", f"{i}"), turn("assistant", forms[i % len(forms)])]} for i in range(120)
    ]
    assert split_rows(rows, RECIPE)[1] == [14, 31, 41, 48, 49, 51, 52, 59, 60, 72, 96, 109]


def tool_rows(**counts):
    """Return rows that call these tools so many times each, "a_b" both of a and b, and as many of text."""
    rows = [general_row(i) for i in range(sum(counts.values()))]
    for name, count in counts.items():
        content = "\n".join(f'<tool_call name="{part}" arguments="{{}}"/>' for part in name.split("_"))
        rows += [
            {"messages": [turn("user", f"{name} {i}"), turn("assistant", content)]} for i in range(count)
        ]
    return rows


@pytest.mark.parametrize(
    ("counts", "held_out"),
    [
        ({"a": 50, "b": 50}, {"a": (5,), "b": (5,)}),
        ({"a": 60, "b": 20, "c": 20}, {"a": (6,), "b": (2,), "c": (2,)}),
        ({"a": 70, "b": 10, "a_b": 10, "c": 10}, {"a": (7,), "b": (1,), "a_b": (1,), "c": (1,)}),
        ({"a": 87, "b": 10, "c": 3}, {"a": (9,), "b": (1,), "c": (0,)}),  # a tenth of three is none
        ({f"t{i}": 1 for i in range(100)}, {f"t{i}": (0, 1) for i in range(100)}),
    ],
)
@pytest.mark.parametrize("seed", [42, 43])
def test_a_tenth_of_each_tools_rows_is_held_out(counts, held_out, seed):
    rows = tool_rows(**counts)
    training, validation = split_rows(rows, recipe(seed=seed))
    assert len(validation) == len(rows) / 10
    assert sorted(training + validation) == list(range(len(rows)))
    asked = [rows[i]["messages"][0]["content"].split()[0] for i in validation]
    assert asked.count("привет") == len(validation) / 2
    assert all(asked.count(name) in held_out[name] for name in counts)


def test_rows_of_tools_that_are_called_once_each_are_not_taken_from_the_top():
    _, validation = split_rows(tool_rows(**{f"t{i}": 1 for i in range(100)}), RECIPE)
    assert max(validation) - 100 > 50


def test_equal_rows_stay_on_one_side():
    rows = [call_row(i % 20) for i in range(60)] + [general_row(i % 20) for i in range(60)]
    training, validation = split_rows(rows, RECIPE)
    assert len(validation) == 12
    texts = [{json.dumps(rows[i]) for i in side} for side in (training, validation)]
    assert not texts[0] & texts[1]


def test_equal_rows_in_two_shapes_stay_on_one_side(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    texts = [
        [turn("user", f"{i}"), turn("assistant", '<tool_call name="f" arguments="{}"/>')] for i in range(20)
    ]
    shaped = [[user, {"role": "assistant", "content": None, "tool_calls": [call]}] for user, _ in texts]
    path = tmp_path / "rows.json"
    path.write_text("\n".join(json.dumps({"messages": messages}) for messages in texts + shaped))
    rows = train_qlora.load_data(path)
    assert all(chat_text.is_call(row["messages"]) for row in rows)
    training, validation = split_rows(rows, RECIPE)
    assert len(validation) == 4
    assert not {i % 20 for i in training} & {i % 20 for i in validation}


def test_words_before_a_call_leave_it_a_call():
    assert chat_text.is_call([turn("user", "?"), turn("assistant", "Секунду.\n<tool_call/>")])
    assert not chat_text.is_call([turn("user", "<tool_call/>"), turn("assistant", "Да.")])


@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_set_too_small_to_split_is_all_trained(count):
    rows = [call_row(i) for i in range(count)] + [general_row(i) for i in range(count)]
    assert split_rows(rows, RECIPE) == (list(range(2 * count)), [])
