"""What counts as a right answer, and the rates worked out by hand."""

from pathlib import Path

import pytest

from tuner.data import chat_rows, chat_text, tool_call
from tuner.inference import judging, probes
from tuner.inference.probes import PROBES
from tuner.system.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CALL = tool_call.format_call("get_sensitive_data", {})


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
    assert judging.judge(answer(text, ended), probes.CALL)[0] == kind
    assert (judging.judge(answer(text, ended), probes.CALL)[1] is None) == (kind == "right")


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
    expected = tool_call.Call("f", {"a": 1, "b": [True, None]}, ())
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
    assert [need for _, need in PROBES] == [True] * 4 + [False] * 2
    assert not {chat_text.normalize(prompt) for prompt, _ in PROBES} & prompts


def test_a_row_with_a_malformed_call_is_an_error_with_its_line():
    for text in ("<tool_call name='f'/>", f"Секунду.\n{CALL}", CALL + CALL):
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]
        with pytest.raises(UserError, match=r"^rows\.json:7: malformed call \(.+\); fix it$"):
            probes.expected_call("rows.json", 7, messages)
