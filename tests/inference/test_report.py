"""What is printed of a verdict: which lines there are, how wide, and with whatever in them."""

import re

import pytest

from tuner.data import tool_call
from tuner.inference import comparison, report
from tuner.inference.judging import Answer
from tuner.inference.probes import Expected, Questions

HOSTILE = "\x1b[2J\u202e\r\n" + "\u200b" * 50


def call(name, **arguments):
    return tool_call.Call(name, arguments, ())


def tags(*calls):
    return "\n".join(tool_call.format_call(call.name, call.arguments) for call in calls)


def questions(path, *due, last="?"):
    """Return Questions: the calls that are due for each, or None for text."""
    messages = [{"role": "user", "content": last}]
    count, expected = len(due), [None if calls is None else Expected(calls) for calls in due]
    texts = ["Yes." if calls is None else tags(*calls) for calls in due]
    return Questions(path, list(range(1, count + 1)), [messages] * count, expected, texts, [])


def printed(capsys, probes, rows, seen=(), **answers):
    """Return the lines of a report and its judgment; answers: of each model, texts to probes and rows."""
    answers = {name: [Answer(text, True, []) for text in texts] for name, texts in answers.items()}
    numbers = range(len(probes.lines) + len(rows.lines))
    judgment = comparison.judge_all(probes, rows, answers, [i in seen for i in numbers], (0.9, 0.1))
    report.print_report(judgment, list(answers), seen_lines=[])
    report.print_verdict("it", judgment, list(answers)[-1])
    output = capsys.readouterr().out
    assert all(line.isprintable() for line in output.splitlines())
    return output.splitlines(), judgment


def labels(lines, title):
    """Return the labels of the table of rates as "step name"; a line without a step is of the one before."""
    start = next(n for n, line in enumerate(lines) if line.startswith(title))
    found, step = [], ""
    for line in lines[start + 1 :]:
        if line.startswith("in brackets"):
            return found
        step = line[:11].strip() or step
        found.append(f"{step} {line[11:26].strip()}")
    raise AssertionError(lines)


DECISION = [
    "decision precision",
    "decision recall",
    "decision F1",
    "decision false calls",
    "decision missed calls",
]
RIGHT = ["all right precision", "all right recall", "all right F1"]
GET, PAY = call("get"), call("pay", sum=5)
NONE = questions(None)


def test_one_tool_without_arguments_needs_no_lines_on_names_and_arguments(capsys):
    probes, rows = questions("p.json", [GET]), questions("r.json", [GET], None)
    good = [tags(GET), tags(GET), "No."]
    lines, _ = printed(capsys, probes, rows, base=["a", "b", "c"], tuned=good)
    assert labels(lines, "r.json") == [*DECISION, "form readable", "form whole answer", *RIGHT]
    assert not any(line.startswith(("tool ", "due ")) for line in lines)
    assert max(map(len, lines)) <= 80
    # The same with a wrong name, by the base alone: a line on names, but no tables, which are tuned's.
    lines, _ = printed(capsys, probes, rows, base=["a", tags(call("new")), "c"], tuned=good)
    assert "name right tools" in labels(lines, "r.json")
    assert not any(line.startswith(("tool ", "due ")) for line in lines)
    lines, _ = printed(capsys, probes, rows, base=["a", "b", "c"], tuned=["", tags(call("new")), "c"])
    assert any(re.fullmatch(r"get +1 +0 +0 +1 +0 +0", line) for line in lines)
    assert "get   new 1" in lines


def test_arguments_and_faults_of_form_have_lines_where_there_are_any(capsys):
    probes, rows = questions("p.json", [PAY]), questions("r.json", [PAY], [PAY], None)
    keys = ["arguments all equal", "arguments keys precision", "arguments keys recall"]
    form = ["form readable", "form whole answer"]
    lines, _ = printed(capsys, probes, rows, tuned=[""] + [tags(PAY)] * 2 + ["No."])
    assert labels(lines, "r.json") == [*DECISION, *keys, *form, *RIGHT]
    lines, _ = printed(capsys, probes, rows, tuned=["", f"So {tags(PAY)}", "<tool_call", " "])
    found = labels(lines, "r.json")
    assert found == [
        *DECISION,
        *keys,
        *form,
        "form parser lost",
        "form text around",
        "form empty or cut",
        *RIGHT,
    ]


def test_every_figure_printed_is_that_of_the_judgment(capsys):
    probes, rows = questions("p.json", [PAY]), questions("r.json", *[[PAY]] * 3, [GET], None, None)
    tuned = ["", tags(PAY), tags(call("pay", sum=6)), "No.", tags(PAY), tags(GET), "<tool_call"]
    base = ["", "No.", tags(PAY), "No.", "No.", "Yes.", "Yes."]
    lines, judgment = printed(capsys, probes, rows, base=base, tuned=tuned)
    for number, model in enumerate(("base", "tuned")):
        shown = [
            re.split(r" {2,}", line[26:].strip())[number] for line in lines if re.match(r".{26}.*\(", line)
        ]
        rates = judgment["rows"][model]
        for step, name, *place in report.LINES:
            rate = rates[place[0]][place[1]] if len(place) > 1 else rates[place[0]]
            if place[-1] in report.FAULTS and not any(
                judgment["rows"][one]["form"][place[-1]]["part"] for one in ("base", "tuned")
            ):
                continue
            text = shown.pop(0)
            if rate["value"] is None:
                assert text == f"– ({rate['part']} of {rate['whole']})"
                continue
            numbers = [float(n) for n in re.findall(r"\d\.\d\d", text)]
            assert numbers == [round(n, 2) for n in (rate["value"], *rate["interval"])], (step, name)
            assert name == "F1" or text.startswith(f"{rate['part']} of {rate['whole']}: ")


def test_twenty_tools_are_readable_and_made_up_ones_are_counted(capsys):
    names = [f"get_{'very_' * (n % 3)}long_name_of_tool_{n}" for n in range(20)]
    due = [[call(name, n=1)] for name in names]
    probes, rows = questions("p.json", due[0]), questions("r.json", *due, *[None] * 30)
    wrong = [tags(call(f"made_up_{n}")) for n in range(30)]
    texts = [tags(*calls) for calls in due]
    lines, _ = printed(capsys, probes, rows, tuned=[texts[0], *texts[:10], *texts[9:19], *wrong])
    table = lines[next(n for n, line in enumerate(lines) if line.startswith("tool ")) :]
    assert max(len(line) for line in lines if not line.startswith("verdict")) <= 80
    rows_of_tools = [line.split() for line in table[1:21]]
    assert [words[1:] for words in rows_of_tools[:10]] == [list("110000")] * 10
    assert [words[1:] for words in rows_of_tools[10:]] == [list("100100")] * 10
    assert table[31].split() == ["20", "others", "0", "0", "0", "0", "0", "20"]
    called = lines[next(n for n, line in enumerate(lines) if re.match("due +called", line)) :]
    assert called[1].split() == [names[0], names[0], "1"]
    assert " ".join(called[11].split()).endswith(f"{names[9]} 1")
    assert any("24 others 24" in line for line in called)


def test_the_called_ones_stand_in_order(capsys):
    probes = questions("p.json", [GET])
    rows = questions("r.json", *[[GET]] * 8, [PAY])
    tuned = [
        tags(GET),
        "No.",
        tags(PAY),
        tags(PAY),
        tags(PAY),
        tags(GET),
        "<tool_call",
        "No.",
        "No.",
        tags(PAY),
    ]
    lines, _ = printed(capsys, probes, rows, tuned=tuned)
    assert "get  get 1, text 3, pay 3, unreadable 1" in lines
    assert "pay  pay 1" in lines


@pytest.mark.parametrize("name", [HOSTILE, "text", "unreadable", "x" * 500, "a b=c)", "{}", "%s"])
def test_whatever_a_tool_or_key_or_answer_is_called_it_is_one_line(capsys, name):
    made = call(name, **{name: [name]})
    probes = questions(name, [made], [made], None, last=name)
    rows = questions(name, [made], [made], None)
    lines, judgment = printed(
        capsys,
        probes,
        rows,
        tuned=[tags(made), tags(GET), tags(made), tags(call(name, **{name: 1})), name, "<tool_call"],
    )
    assert [probe["pass"] for probe in judgment["probes"]] == [True, False, False]
    assert len(lines) < 80


def test_a_probe_is_printed_with_its_last_turn_and_where_it_fails(capsys):
    probes = questions("p.json", [GET, PAY], [PAY], None)
    probes = probes._replace(conversations=[[{"role": "tool", "content": "<5>"}]] * 3)
    lines, _ = printed(
        capsys, probes, NONE, base=["a", "b", "c"], tuned=[tags(PAY, GET), tags(call("pay", sum=4)), ""]
    )
    assert lines[:16] == [
        "",
        "probe 1    pass",
        "  result    <5>",
        "  expected  get(), pay(sum=5)",
        "  base      a",
        '  tuned     <tool_call name="pay" arguments="{&quot;sum&quot;: 5}"/> <tool_call',
        '            name="get" arguments="{}"/>',
        "",
        "probe 2    FAIL: arguments: pay: sum is 4, not 5",
        "  result    <5>",
        "  expected  pay(sum=5)",
        "  base      b",
        '  tuned     <tool_call name="pay" arguments="{&quot;sum&quot;: 4}"/>',
        "",
        "probe 3    FAIL: form: an empty answer",
        "  result    <5>",
    ]
    assert lines[-2:] == [
        "rows       heldout.json: no such file; judged by the probes alone",
        "verdict    it falls short: 1 of 3 probes pass",
    ]


def test_deviations_from_the_canonical_form_are_named(capsys):
    text = "<tool_call name='get' arguments='{}'><tool_call name=\"get\"  arguments=\"{}\"/>"
    lines, _ = printed(capsys, questions("p.json", [GET, GET]), NONE, tuned=[text])
    assert "probe 1    pass" in lines
    assert "  form      no closing slash, single quotes, spaces" in lines


def test_rows_that_were_trained_on_are_not_counted(capsys):
    probes, rows = questions("p.json", [GET]), questions("r.json", *[[GET]] * 12)
    texts = [tags(GET)] + ["No."] * 4 + [tags(GET)] * 8
    lines, judgment = printed(capsys, probes, rows, tuned=texts, seen={1, 2, 3, 4})
    assert judgment["rows"]["seen_in_training"] == 4
    assert judgment["rows"]["tuned"]["decision"]["recall"]["whole"] == 8
    assert lines[-2:] == [
        "rows       r.json: 8 unseen rows, fewer than 10; judged by the probes alone",
        "verdict    it passes 1 of 1 probes",
    ]
