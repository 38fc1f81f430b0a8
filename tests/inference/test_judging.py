"""What counts as a right answer, and the rates worked out by hand."""

import json
from pathlib import Path

import pytest

from tests.support.rows import row
from tuner.data import chat_rows, chat_text, tool_call
from tuner.inference import judging, probes
from tuner.system.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CALL = tool_call.format_call("get_sensitive_data", {})
DUE = probes.Expected([tool_call.Call("get_sensitive_data", {}, ())])


def answer(text, ended=True):
    return judging.Answer(text, ended, [])


@pytest.mark.parametrize(
    ("text", "ended", "kind"),
    [
        (CALL, True, "right"),
        ("<tool_call name='get_sensitive_data' arguments='{}'>", True, "right"),
        (CALL, False, "malformed"),
        (CALL + " ", True, "malformed"),
        ("Вот: " + CALL, True, "malformed"),
        (CALL + CALL, True, "malformed"),
        (tool_call.format_call("get_data", {}), True, "malformed"),
        (tool_call.format_call("get_sensitive_data", {"id": 1}), True, "malformed"),
        ('<tool_call name="get_sensitive_data" arguments" arguments="{}"/>', True, "malformed"),
        ("Ваш баланс 100 рублей.", True, "missed"),
        ("", True, "missed"),
    ],
)
def test_a_call_counts_only_if_it_is_the_whole_answer(text, ended, kind):
    assert judging.judge(answer(text, ended), DUE)[0] == kind
    assert (judging.judge(answer(text, ended), DUE)[1] is None) == (kind == "right")


@pytest.mark.parametrize(
    ("text", "ended", "kind"),
    [
        ("Здравствуйте!", True, "right"),
        ("Здравствуйте!", False, "unfit"),
        (" \n", True, "unfit"),
        (CALL, True, "false"),
        ("Секунду <tool_call", True, "false"),
        ("Секунду <tool_call", False, "false"),
    ],
)
def test_a_general_answer_counts_without_a_trace_of_a_call(text, ended, kind):
    assert judging.judge(answer(text, ended), None)[0] == kind


def test_arguments_are_equal_as_json():
    expected = probes.Expected([tool_call.Call("f", {"a": 1, "b": [True, None]}, ())])
    same = """<tool_call name='f' arguments='{"b": [true, null], "a": 1}'/>"""
    assert judging.judge(answer(same), expected)[0] == "right"
    for other in ('{"a": 1}', '{"a": true, "b": [true, null]}', '{"a": "1", "b": [true, null]}'):
        text = f"<tool_call name='f' arguments='{other}'/>"
        assert judging.judge(answer(text), expected) == (
            "malformed",
            "arguments differ from the expected ones",
        )


def test_the_figures_of_a_table_worked_out_by_hand():
    kinds = ["right"] * 3 + ["missed"] + ["malformed"] * 2 + ["false", "unfit", "right", "right"]
    figures = judging.rates(kinds, [True] * 6 + [False] * 4)
    counts = {"needed": 6, "right": 3, "missed": 1, "malformed": 2, "general": 4, "false": 1, "unfit": 1}
    assert {key: figures[key] for key in counts} == counts
    # Six calls were made: three right, two malformed, one false.
    assert figures["of"] == {"precision": [3, 6], "recall": [3, 6], "f1": [3, 9], "false_call_rate": [1, 4]}
    assert (figures["precision"], figures["recall"], figures["false_call_rate"]) == (0.5, 0.5, 0.25)
    assert figures["f1"] == pytest.approx(2 * 0.5 * 0.5 / (0.5 + 0.5))
    # Wilson's formula with z = 1.959964, on paper: 3 of 6, 1 of 4, and 3 of 9 carried over by 2J / (1 + J).
    assert figures["intervals"]["recall"] == pytest.approx([0.1876, 0.8124], abs=1e-4)
    assert figures["intervals"]["false_call_rate"] == pytest.approx([0.0456, 0.6994], abs=1e-4)
    jaccard = 0.1206, 0.6458
    assert figures["intervals"]["f1"] == pytest.approx([2 * j / (1 + j) for j in jaccard], abs=2e-4)


def test_the_figures_at_the_edges():
    assert judging.wilson(20, 20) == pytest.approx((0.8389, 1), abs=1e-4)
    assert judging.wilson(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)
    silent = judging.rates(["missed", "right"], [True, False])
    assert silent["precision"] is None
    assert silent["intervals"]["precision"] == [None, None]
    assert (silent["recall"], silent["f1"], silent["false_call_rate"]) == (0, 0, 0)
    assert judging.rates([], [])["f1"] is None


def test_no_probe_stands_in_the_rows():
    prompts = {
        chat_text.normalize(row["messages"][0]["content"])
        for path in ("examples.json", "heldout.json")
        for _, row in chat_rows.read_rows(ROOT / path)
    }
    asked = probes.load_questions(ROOT / probes.PROBES)
    assert asked.expected == [DUE] * 4 + [None] * 2
    assert not {chat_text.normalize(messages[-1]["content"]) for messages in asked.conversations} & prompts


RATE = tool_call.format_call("get_rate", {"currency": "USD"})
BROKEN = {  # a held-out row's answer, and what is wrong with it
    "<tool_call name='f'/>": "no arguments",
    f"{CALL}\n<tool_call name='f' arguments='5'/>": tool_call.NO_OBJECT,
    f"Секунду. <tool_call {CALL}": tool_call.INCOMPLETE,
    f"<tool_call name='f' {CALL} arguments='{{}}'/>": tool_call.INCOMPLETE,
    f"{CALL}</tool_call>": "a broken tag beside the call",
}


def test_rows_with_malformed_calls_are_all_listed_with_their_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [row("?", text) for text in ("Да.", *BROKEN, CALL)]
    Path("rows.json").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(UserError) as error:
        probes.load_questions("rows.json")
    lines = [
        f"rows.json:{n}: malformed call ({reason}); fix it" for n, reason in enumerate(BROKEN.values(), 2)
    ]
    assert str(error.value).splitlines() == lines


ANSWERS = [CALL, f"{CALL}\n{RATE}", f"{RATE} {CALL}", f"Секунду.\n{CALL}", f"{CALL} {CALL}\nСейчас.", "Да.\n"]
JUDGED = {  # an answer: the rows that it is right for
    CALL: [0, 3],
    f"{CALL}{RATE}": [1, 2],
    f"{RATE}\n{CALL}": [1, 2],
    f"Да: {CALL}": [3],
    f"Да: {RATE} {CALL}": [],
    f"{CALL} {RATE} {CALL}": [],
    f"{CALL}\n{tool_call.format_call('get_rate', {})}": [],
    f"{CALL}\n{CALL}": [4],
    f"{CALL}, {CALL}": [4],
    f"{CALL}<tool_call": [],
    "Да, вот tool_call": [],
    "Нет.": [5],
}


@pytest.mark.parametrize("text", JUDGED)
def test_calls_count_in_any_order_and_words_beside_them_where_the_row_has_words(text):
    expected = [probes.expected_answer(text) for text in map(str.strip, ANSWERS)]
    kinds = [judging.judge(answer(text), one)[0] for one in expected]
    assert [number for number, kind in enumerate(kinds) if kind == "right"] == JUDGED[text]
    assert all(judging.judge(answer(text, False), one)[0] != "right" for one in expected)


def test_every_row_is_right_for_its_own_answer():
    expected = [probes.expected_answer(text) for text in map(str.strip, ANSWERS)]
    for text, one in zip(ANSWERS, expected, strict=True):
        assert judging.judge(answer(text), one) == ("right", None)


def test_the_reason_of_a_wrong_answer_to_a_row_of_several_calls_is_said():
    expected = probes.expected_answer(f"{CALL}\n{RATE}")
    reasons = {
        CALL: "calls get_sensitive_data, not get_rate, get_sensitive_data",
        f"{RATE}{RATE}": "calls get_rate, get_rate, not get_rate, get_sensitive_data",
        f"{CALL}{RATE.replace('USD', 'EUR')}": "arguments differ from the expected ones",
        f"Да. {CALL}{RATE}": "text around the call",
    }
    for text, reason in reasons.items():
        assert judging.judge(answer(text), expected) == ("malformed", reason)
