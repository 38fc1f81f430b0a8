"""The figures of a verdict, worked out by hand, and the gate that they pass or not."""

import pytest

from tuner.data import tool_call
from tuner.inference import gate, judging, rates
from tuner.inference.probes import Expected


def call(name, **arguments):
    return tool_call.Call(name, arguments, ())


def tags(*calls):
    return "\n".join(tool_call.format_call(call.name, call.arguments) for call in calls)


def count(*questions):
    """Return the figures of questions, each (the calls due or None for text, an answer, whether it ended)."""
    expected = [None if due is None else Expected(due) for due, *_ in questions]
    answers = [judging.Answer(text, not cut, []) for _, text, *cut in questions]
    return rates.count(list(map(judging.judge, answers, expected)), expected)


PAY = call("pay", to="Ann", sum=5, note="x")
GET = call("get", of="card")
TEN = (  # ten calls due and five texts: each kind of mistake
    ([GET], tags(GET)),  # right
    ([PAY], tags(call("pay", to="Ann", sum=5.0, note="x"))),  # right: 5 is 5.0
    ([GET, PAY], tags(PAY, GET)),  # right in any order
    ([PAY], tags(call("pay", to="Ann", sum=6, note="x", of=1))),  # 2 of 3 keys due, 2 of 4 made
    ([GET], tags(call("get", of="cash"))),  # 0 of 1
    ([GET], tags(PAY)),  # another tool
    ([GET, PAY], tags(PAY)),  # one is missed
    ([GET], f"So: {tags(GET)}"),  # right, but for text around it
    ([GET], '<tool_call name="get" arguments="{of: 1}"/>'),  # no parser reads it
    ([PAY], "Yes."),  # missed
    (None, "Hello."),
    (None, "Hello", True),  # cut
    (None, " "),
    (None, f"Hm {tags(GET, call('new'))}"),
    (None, "<tool_call>"),
)


def parts(figures):
    """Return figures as (part, whole) in place of each rate."""
    if "part" in figures:
        return figures["part"], figures["whole"]
    return {key: parts(value) for key, value in figures.items()}


def test_the_figures_of_a_table_worked_out_by_hand():
    figures = count(*TEN)
    tools, confusion = figures.pop("tools"), figures.pop("confusion")
    assert parts(figures) == {
        # 11 answers with a call or a trace of one, 9 of them where one of 10 was due.
        "decision": {
            "precision": (9, 11),
            "recall": (9, 10),
            "f1": (18, 21),
            "false_call_rate": (2, 5),
            "missed": (1, 10),
        },
        "names": (6, 8),
        "arguments": (4, 6),
        # Keys of the six: 1, 3, 4, 3 (or 4 made), 1, 1; equal are all of them, but for 1 and 1.
        "keys": {"precision": (1 + 3 + 4 + 2 + 0 + 1, 14), "recall": (11, 13)},
        "form": {
            "readable": (8, 9),
            "whole": (7, 9),
            "parser_lost": (1, 9),
            "text_around": (1, 9),
            "truncated": (0, 9),
            "unfit": (2, 5),
        },
        "right": {"precision": (3, 11), "recall": (3, 10), "f1": (6, 21)},
    }
    keys = ("needed", "right", "wrong_arguments", "other_tool", "missed", "unreadable", "false")
    assert tools == {
        "get": dict(zip(keys, (7, 3, 1, 1, 1, 1, 1), strict=True)),
        "pay": dict(zip(keys, (5, 3, 1, 0, 1, 0, 0), strict=True)),
        "new": dict(zip(keys, (0, 0, 0, 0, 0, 0, 1), strict=True)),
    }
    assert list(tools) == ["get", "pay", "new"]
    assert confusion == {
        "get": {"get": 4, "pay": 1, "text": 1, "unreadable": 1},
        "pay": {"pay": 4, "text": 1},
        "text": {"text": 3, "get": 1, "new": 1, "unreadable": 1},
    }
    for counts in tools.values():
        assert counts["needed"] == sum(counts[key] for key in keys[1:-1])


def test_a_rate_has_its_value_and_its_wilson_interval():
    figures = count(*TEN)
    # Wilson's formula with z = 1.959964, on paper.
    assert figures["decision"]["false_call_rate"] == {
        "part": 2,
        "whole": 5,
        "value": 0.4,
        "interval": pytest.approx([0.1176, 0.7693], abs=1e-4),
    }
    assert figures["keys"]["recall"]["value"] == 11 / 13
    f1 = figures["right"]["f1"]
    precision, recall = 3 / 11, 3 / 10
    assert f1["value"] == pytest.approx(2 * precision * recall / (precision + recall))
    # 3 right of the 18 that were due or made, as Jaccard's index has it, carried over by 2J / (1 + J).
    assert f1["interval"] == pytest.approx([2 * j / (1 + j) for j in (0.0584, 0.3922)], abs=2e-4)


def test_the_rates_at_the_edges():
    assert rates.wilson(20, 20) == pytest.approx([0.8389, 1], abs=1e-4)
    assert rates.wilson(0, 20) == pytest.approx([0, 0.1611], abs=1e-4)
    silent = count(([GET], "Yes."), (None, "No."))
    nothing = {"part": 0, "whole": 0, "value": None, "interval": None}
    assert silent["decision"]["precision"] == silent["names"] == silent["arguments"] == nothing
    assert silent["keys"]["recall"] == silent["form"]["readable"] == nothing
    assert [silent["decision"][key]["value"] for key in ("recall", "f1", "false_call_rate", "missed")] == [
        0,
        0,
        0,
        1,
    ]
    empty = count()
    assert empty["right"]["f1"] == nothing
    assert (empty["tools"], empty["confusion"]) == ({}, {})


def test_a_right_answer_is_never_more_than_a_right_decision():
    for number in range(1, len(TEN) + 1):
        figures = count(*TEN[:number])
        for name in ("precision", "recall", "f1"):
            decision, right = figures["decision"][name]["value"], figures["right"][name]["value"]
            assert right is None or right <= decision


def test_tools_called_text_or_unreadable_are_not_mixed_up_with_text():
    names = ("text", "unreadable", '"text"', '"text', "Text")
    questions = [([call(name)], tags(call(name))) for name in names]
    figures = count(*questions, ([call("text")], "No."), (None, "Yes."), (None, tags(call("text"))))
    shown = ('"text"', '"unreadable"', '""text""', '""text"', "Text")
    assert figures["confusion"] == {
        **{name: {name: 1} for name in shown},
        '"text"': {'"text"': 1, "text": 1},
        "text": {"text": 1, '"text"': 1},
    }
    assert list(figures["tools"]) == list(names)


# ------------------------------------------------------------------------------------------- the gate


def rows(due, called, general, false, right=None):
    """Return figures of rows: `right` of the calls made are right in everything, all by default."""
    good = [([GET], tags(GET))] * (called if right is None else right)
    wrong = [([GET], tags(PAY))] * (called - len(good))
    missed = [([GET], "Yes.")] * (due - called)
    return count(*good, *wrong, *missed, *[(None, tags(GET))] * false, *[(None, "No.")] * (general - false))


GATES = [  # probes, figures, what falls short
    ([True] * 6, rows(20, 20, 20, 0), []),
    ([True] * 5 + [False], rows(20, 20, 20, 0), ["5 of 6 probes pass"]),
    # 18 of 20: F1 36 / 40 is 0.9, and 2 of 20 false calls are 0.1: just enough
    ([True], rows(20, 18, 20, 2), []),
    ([True], rows(20, 20, 20, 3), ["3 of 20 false calls: 0.15 (at most 0.1: --max-false-calls)"]),
    ([True], rows(20, 20, 20, 0, right=17), ["F1 0.85 of 20 calls (at least 0.9: --min-f1)"]),
    (
        [False],
        rows(20, 14, 20, 9, right=10),
        [
            "0 of 1 probes pass",
            "F1 0.47 of 20 calls (at least 0.9: --min-f1)",
            "9 of 20 false calls: 0.45 (at most 0.1: --max-false-calls)",
        ],
    ),
    # What rounding would hide: 899 of 1000, 101 of 1000.
    ([True], rows(1000, 1000, 0, 0, right=899), ["F1 0.899 of 1000 calls (at least 0.9: --min-f1)"]),
    ([True], rows(0, 0, 1000, 101), ["101 of 1000 false calls: 0.101 (at most 0.1: --max-false-calls)"]),
    # Nothing is asked of fewer than ten rows, nor of rows of a kind that there are none of.
    ([True], rows(5, 0, 4, 4), []),
    ([True], rows(5, 0, 5, 0), ["F1 0.00 of 5 calls (at least 0.9: --min-f1)"]),
    ([True], rows(10, 9, 0, 0), []),
    ([True], rows(0, 0, 10, 1), []),
    ([True], rows(0, 0, 0, 0), []),
]


@pytest.mark.parametrize(("probes", "figures", "short"), GATES)
def test_what_falls_short_is_said_with_its_number_and_flag(probes, figures, short):
    result = gate.check(probes, figures, gate.MIN_F1, gate.MAX_FALSE_CALLS)
    assert (result["short"], result["passed"]) == (short, not short)
    reached = result["reached"]
    assert reached["probes"] == {"part": sum(probes), "whole": len(probes)}
    decision = figures["decision"]
    assert reached["rows"] == decision["recall"]["whole"] + decision["false_call_rate"]["whole"]
    assert (reached["f1"], reached["false_call_rate"]) == (
        figures["right"]["f1"]["value"],
        decision["false_call_rate"]["value"],
    )


def test_what_is_asked_is_what_the_flags_say_where_there_are_rows_for_it():
    def asked(figures):
        return tuple(gate.check([True], figures, 0.5, 0.25)["asked"].values())

    assert asked(rows(20, 10, 20, 5)) == (0.5, 0.25)
    assert asked(rows(10, 10, 0, 0)) == (0.5, None)
    assert asked(rows(0, 0, 10, 0)) == (None, 0.25)
    assert asked(rows(4, 0, 5, 0)) == (None, None)
    assert gate.check([True], rows(20, 20, 0, 0, right=10), 0.5, 0)["passed"]
    assert gate.check([True], rows(20, 20, 0, 0, right=9), 0.5, 0)["short"]
    assert gate.check([True], rows(20, 0, 20, 20), 0, 1)["passed"]
