"""Which rows are held out."""

import json

import pytest

import train_qlora
from tests.support.training import shipped_rows, turn
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
    assert sorted(training + validation) == list(range(70))
    assert len(validation) == 7
    assert sum(chat_text.is_call(rows[i]["messages"]) for i in validation) in (3, 4)
    assert split_rows(rows, RECIPE) == (training, validation)


@pytest.mark.parametrize(
    ("calls", "general", "held_out"), [(90, 10, (9, 1)), (40, 40, (4, 4)), (30, 0, (3, 0))]
)
def test_the_split_keeps_the_proportion(calls, general, held_out):
    rows = [call_row(i) for i in range(calls)] + [general_row(i) for i in range(general)]
    _, validation = split_rows(rows, RECIPE)
    kinds = [chat_text.is_call(rows[i]["messages"]) for i in validation]
    assert (kinds.count(True), kinds.count(False)) == held_out


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
