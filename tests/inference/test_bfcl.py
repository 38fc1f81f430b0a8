"""Our verdict held against BFCL's AST checker, on BFCL's rows: `pytest -m bfcl`, see CONTRIBUTING.md.

The ground truth of a row lists the values that are allowed for each key. The first of them make the answer
that a row of ours would have; from it come answers that differ in one thing, right or wrong, as tags. Both
judges are given the same calls. The tables say on how many answers they agree; RULES says why not on others.
"""

import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest

from tuner.data.tool_call import Call, format_call
from tuner.inference.judging import Answer, judge
from tuner.inference.probes import Expected, read_calls

pytestmark = pytest.mark.bfcl
COLUMNS = {
    "simple_python": "simple",
    "multiple": "multiple",
    "parallel": "parallel",
    "parallel_multiple": "both",
}
LIVE = ("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple")  # questions of users
ABSENT = ""  # among the allowed values of a key: it may be left out
WORDS = "Сейчас посмотрю. "

# Each difference must fall under exactly one of these.
RULES = {
    "optional key": "BFCL lets it be there or not; we ask for what the row's own answer has",
    "other value": "BFCL takes any that it lists; we ask for the one in the row's own answer",
    "spelling": "BFCL compares strings without case, spaces and ,./-_*^ and takes ' for \"; we do not",
    "numbers": "BFCL takes no 5.0 for an integer, and no 5 in a list of floats; to us they are equal",
    "true is 1": "BFCL compares what is in objects as Python does; to us true is no number",
    "empty list": "BFCL reads the mark of a list that may be left out as a list, an empty one",
    "greedy": "BFCL takes the first call that fits, and may have none left for the next; we match equal ones",
    "no answer": "BFCL needs a key that has no value in its ground truth, or no place in its schema",
    "form": "BFCL is given the calls alone; we ask for nothing around them, no cut, and no empty answer",
    "trace": "BFCL takes a tag that cannot be read for text where text is due; to us any trace is a call",
}
AGREEMENT = """
                           simple    multiple    parallel        both        live
the row's own             400/400     200/200     200/200     200/200   1346/1351  no answer 5
cut off at the limit        0/400       0/200       0/200       0/200      5/1351  form 2346
words beside calls          0/400       0/200       0/200       0/200      5/1351  form 2346
text                      400/400     200/200     200/200     200/200   1351/1351
unreadable tag            800/800     400/400     400/400     400/400   2702/2702
one call too many         400/400     200/200     200/200     200/200   1351/1351
another name              400/400     200/200     540/540     607/607   1405/1405
order of keys             400/400     200/200     540/540     607/607   1400/1405  no answer 5
unknown key               407/407     204/204     544/544     613/613   1441/1441
needed key left out       970/970     475/475   1310/1310   1438/1438   3180/3180
wrong value             1379/1382     654/655   1812/1815   1965/1969   3560/3560  other value 6, empty list 5
wrong type              1854/1854     880/880   2637/2641   2664/2664   4175/4180  true is 1 9
5.0 for 5, and back        14/445       8/211      19/762     158/687     114/488  numbers 2279, no answer 1
optional key left out        2/93        0/40       1/134       2/123        8/31  optional key 408
other spelling              8/665       0/307       0/723      17/980     26/2703  spelling 5327
optional key added           0/86        0/44        0/39        0/20      2/1737  optional key 1924
other allowed value         0/280       0/223       0/366       0/469       0/141  other value 1479
inner key left out          18/18       12/12       10/10       22/22       89/94  other value 5
order of calls                0/0         0/0     199/200     200/200       40/40  greedy 1
one for another               0/0         0/0     199/200     200/200       40/40  spelling 1
one call missing              0/0         0/0     540/540     607/607       94/94
all                     7452/9800   3633/4851  9351/11764 10100/12606 22334/29996
"""
SAME_STEP = {"arguments": 18687, "name": 5503, "decision": 2351}
IRRELEVANCE = """
                      irrelevance        live
text                      240/240     958/958
call                      480/480   1768/1768
unreadable tag              0/240       0/884  trace 1124
empty answer                0/240       0/884  form 1124
all                      720/1200   2726/4494
"""


class Case(NamedTuple):
    """A row of BFCL."""

    category: str
    functions: list
    truth: list  # {name: {key: [allowed value, …]}} of each call
    calls: list  # [name, {key: first allowed value}] of each call

    def schema(self, place):
        """Return the schema of the arguments of the call at that place."""
        (name,) = self.truth[place]
        return next(function["parameters"] for function in self.functions if function["name"] == name)


class Made(NamedTuple):
    """An answer that was made up from a case."""

    kind: str
    text: str
    calls: list | None  # that are in it, each [name, arguments]; None: a tag that cannot be read
    ended: bool = True


@pytest.fixture(scope="module")
def bfcl():
    """Return (check, rows): BFCL's checker of a case's calls, and the reader of its files.

    The checker imports a table of all models that BFCL knows, and with it the clients of twenty vendors, only
    to ask whether a model writes _ for the dots in names. A table of one model that does not stands in.
    """
    package = pytest.importorskip("bfcl_eval", reason="no bfcl-eval; CONTRIBUTING.md says how to install it")
    table = ModuleType("bfcl_eval.constants.model_config")
    table.MODEL_CONFIG_MAPPING = {"ours": SimpleNamespace(underscore_to_dot=False)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, table.__name__, table)
        from bfcl_eval.constants.enums import Language
        from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker

    def check(case, calls):
        """Return (whether the calls are right, the type of error)."""
        made = [{name: arguments} for name, arguments in calls]
        result = ast_checker(case.functions, made, case.truth, Language.PYTHON, case.category, "ours")
        return result["valid"], result.get("error_type")

    def rows(name):
        path = Path(package.__file__).parent / f"data/{name}.json"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    return check, rows


def read_cases(rows, category):
    """Yield the Cases of a category."""
    truths = {row["id"]: row["ground_truth"] for row in rows(f"possible_answer/BFCL_v4_{category}")}
    for row in rows(f"BFCL_v4_{category}"):
        case = Case(category, row["function"], truths[row["id"]], [])
        for place, call in enumerate(case.truth):
            required = case.schema(place)["required"]
            firsts = {}
            for key, values in choices(case, place).items():
                given = [value for value in values if not is_absent(value)]
                if given and (key in required or not is_absent(values[0])):
                    firsts[key] = given[0]
            case.calls.append([*call, firsts])
        yield case


def is_absent(value):
    return isinstance(value, str) and value == ABSENT


def choices(case, place):
    """Return {key: [value or ABSENT, …]} of the call at that place; of an object one for each inner value."""
    (allowed,) = case.truth[place].values()
    properties, found = case.schema(place)["properties"], {}
    for key, values in allowed.items():
        if key in properties:
            kinds = properties[key]["type"], properties[key].get("items", {}).get("type")
            found[key] = [variant for value in values for variant in variants(value, kinds)]
    return found


def variants(value, kinds):
    """Yield the values for which an allowed value stands; kinds: the types of it and of its items."""
    if kinds[0] == "dict" and isinstance(value, dict):
        yield from objects(value)
    elif kinds[1] == "dict" and isinstance(value, list):
        several = [list(objects(template)) for template in value]
        firsts = [found[0] for found in several]
        yield firsts
        for place, found in enumerate(several):
            for other in found[1:]:
                yield [*firsts[:place], other, *firsts[place + 1 :]]
    else:
        yield value


def objects(template):
    """Yield the object of {key: [value or ABSENT, …]} with all first values, then those with one other."""
    firsts = {key: values[0] for key, values in template.items()}
    others = [{**firsts, key: value} for key, values in template.items() for value in values[1:]]
    for made in [firsts, *others]:
        yield {key: value for key, value in made.items() if not is_absent(value)}


def exact(value):
    """Return the JSON of a value: its keys in order, whole floats as integers."""
    if isinstance(value, float) and value.is_integer():
        return exact(int(value))
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(key)}:{exact(value[key])}" for key in sorted(value)) + "}"
    return "[" + ",".join(map(exact, value)) + "]" if isinstance(value, list) else json.dumps(value)


def spelled(value):
    """Return a value with its strings as BFCL compares them."""
    if isinstance(value, str):
        return re.sub(r"[ ,./_*^-]", "", value).lower().replace("'", '"')
    if isinstance(value, list):
        return [spelled(item) for item in value]
    return {key: spelled(item) for key, item in value.items()} if isinstance(value, dict) else value


def make_answers(case):
    """Yield the Made answers of a case: its own calls, and what differs from them in one thing."""

    def made(kind, calls):
        return Made(kind, "".join(format_call(*call) for call in calls), calls)

    own = made("the row's own", case.calls)
    yield own
    yield own._replace(kind="cut off at the limit", ended=False)
    yield own._replace(kind="words beside calls", text=WORDS + own.text)
    yield Made("text", WORDS, [])
    yield Made("unreadable tag", own.text.removesuffix("/>"), None)
    yield Made("unreadable tag", own.text.replace("arguments=", "args="), None)
    yield made("one call too many", [*case.calls, case.calls[-1]])
    if len(case.calls) > 1:
        yield made("order of calls", case.calls[::-1])
        yield made("one for another", [*case.calls[:-1], case.calls[0]])
    for place in range(len(case.calls)):
        before, after = case.calls[:place], case.calls[place + 1 :]
        if before or after:
            yield made("one call missing", before + after)
        for kind, *call in changed_calls(case, place):
            yield made(kind, [*before, call, *after])


def changed_calls(case, place):
    """Yield (kind, name, arguments) of calls that differ in one thing from the call at that place."""
    name, arguments = case.calls[place]
    others = [function["name"] for function in case.functions if function["name"] != name]
    yield "another name", (others or [f"{name}_2"])[0], arguments
    yield "order of keys", name, reorder(arguments)
    yield "unknown key", name, {**arguments, "no_such_key": 1}
    for key, values in choices(case, place).items():
        rest = {other: value for other, value in arguments.items() if other != key}
        own = arguments.get(key, ABSENT)
        for value in {exact(value): value for value in values if exact(value) != exact(own)}.values():
            if not is_absent(value):
                kind = "optional key added" if is_absent(own) else "other allowed value"
                yield kind, name, {**rest, key: value}
        if not is_absent(own):
            optional = any(map(is_absent, values))
            yield "optional key left out" if optional else "needed key left out", name, rest
            for kind, value in changed_values(own):
                yield kind, name, {**rest, key: value}


def reorder(value):
    """Return a value with the keys of its objects the other way round."""
    if isinstance(value, list):
        return list(map(reorder, value))
    return {key: reorder(value[key]) for key in reversed(value)} if isinstance(value, dict) else value


def changed_values(value):
    """Yield (kind, value) of values that differ from a value in one thing."""
    if isinstance(value, bool) or value is None:
        yield "wrong value", not value
        yield "wrong type", int(bool(value))
    elif isinstance(value, (int, float)):
        yield "wrong value", value + 1
        yield "wrong type", bool(value)
        if float(value).is_integer():
            yield "5.0 for 5, and back", float(value) if isinstance(value, int) else int(value)
    elif isinstance(value, str):
        yield "wrong value", value + "x"
        yield "wrong type", [value]
        yield "other spelling", value.swapcase() + " "
    elif isinstance(value, list):
        yield "wrong value", [*value, 0]
        if value:
            yield "wrong value", value[:-1]
        for place, item in enumerate(value):
            for kind, changed in changed_values(item):
                yield kind, [*value[:place], changed, *value[place + 1 :]]
    else:
        yield "unknown key", {**value, "no_such_key": 1}
        for key, item in value.items():
            yield "inner key left out", {other: value[other] for other in value if other != key}
            for kind, changed in changed_values(item):
                yield kind, {**value, key: changed}
    if not isinstance(value, str):
        yield "wrong type", json.dumps(value)


def explain(case, made, check):
    """Return the rules by which BFCL and we differ on an answer."""
    own, other = ([json.dumps(call, sort_keys=True) for call in calls] for calls in (case.calls, made.calls))
    accepted, reordered = check(case, case.calls)[0], own != other and sorted(own) == sorted(other)
    by_rule = {
        "numbers": accepted and own != other and exact(case.calls) == exact(made.calls),
        "greedy": accepted and reordered,
        "no answer": contradictory(case),
        "form": not made.ended or made.text.startswith(WORDS),
    }
    rules = {rule for rule, applies in by_rule.items() if applies}
    for place, pair in enumerate([] if reordered else zip(case.calls, made.calls, strict=True)):
        for key, allowed in choices(case, place).items():
            values = [arguments.get(key, ABSENT) for _, arguments in pair]
            if exact(values[0]) != exact(values[1]):
                rules |= explain_value(*values, allowed)
    return rules


def explain_value(own, value, allowed):
    """Return the rules by which BFCL takes a value for the row's own one; either may be ABSENT."""
    listed = exact(value) in map(exact, allowed)
    absent = is_absent(own) or is_absent(value)
    by_rule = {
        "optional key": listed and absent,
        "other value": listed and not absent,
        "spelling": not listed and exact(spelled(value)) in map(exact, map(spelled, allowed)),
        "true is 1": not listed and value in allowed,
        "empty list": not listed and value == [] and any(map(is_absent, allowed)),
    }
    return {rule for rule, applies in by_rule.items() if applies}


def contradictory(case):
    """Return whether a key that BFCL needs in a call has no allowed value, or no place in the schema."""
    for place, truth in enumerate(case.truth):
        (allowed,) = truth.values()
        needed = {*case.schema(place)["required"], *(key for key in allowed if ABSENT not in allowed[key])}
        values = choices(case, place)
        if any(all(map(is_absent, values.get(key, []))) for key in needed):
            return True
    return False


@pytest.fixture(scope="module")
def compared(bfcl):
    """Return (case, made, verdict, right, error) of all answers; right and error are BFCL's."""
    check, rows = bfcl
    found = []
    for category in (*COLUMNS, *LIVE):
        for case in read_cases(rows, category):
            expected = Expected([Call(*call, ()) for call in case.calls])
            for made in make_answers(case):
                verdict = judge(Answer(made.text, made.ended, []), expected)
                theirs = (False, "unreadable") if made.calls is None else check(case, made.calls)
                found.append((case, made, verdict, *theirs))
    return found


def due_step(case, made):
    """Return what is wrong first in an answer that is wrong, worked out from how it was made."""
    if not made.calls:
        return "form" if made.calls is None else "decision"
    if sorted(name for name, _ in made.calls) != sorted(name for name, _ in case.calls):
        return "name"
    return "arguments" if sorted(map(exact, made.calls)) != sorted(map(exact, case.calls)) else "form"


def bfcl_step(made, error):
    """Return the step that BFCL's type of error stands for; None where it is only that some call is wrong."""
    kind = error.partition(":")[2]
    if made.calls is None or kind == "cannot_find_match":
        return None
    by_kind = {"wrong_count": "name" if made.calls else "decision", "wrong_func_name": "name"}
    return by_kind.get(kind, "arguments")


def print_table(columns, agreed, answers, rules):
    """Print, and return as lines, on how many of how many answers the judges agree, and why not on others."""
    lines = [" " * 21 + "".join(column.rjust(12) for column in columns)]
    for column in columns:
        for counts in (agreed, answers):
            counts["all", column] = sum(count for (_, c), count in counts.items() if c == column)
    for kind in dict.fromkeys(kind for kind, _ in answers):
        cells = [f"{agreed[kind, column]}/{answers[kind, column]}".rjust(12) for column in columns]
        why = ", ".join(f"{rule} {rules[kind][rule]}" for rule in RULES if rules[kind][rule])
        lines.append(f"{kind:21}{''.join(cells)}  {why}".rstrip())
    used = sum(rules.values(), Counter())
    print("", *lines, "", *(f"{rule}: {RULES[rule]}" for rule in used), sep="\n")
    return lines


def test_the_verdict_agrees_with_bfcl_but_for_what_the_rules_say(bfcl, compared):
    answers, agreed, rules = Counter(), Counter(), defaultdict(Counter)
    for case, made, verdict, right, error in compared:
        column = COLUMNS.get(case.category, "live")
        answers[made.kind, column] += 1
        if (verdict.step is None) == right:
            agreed[made.kind, column] += 1
        else:
            found = explain(case, made, check=bfcl[0])
            assert len(found) == 1, (found, case, made, verdict, error)
            rules[made.kind].update(found)
    columns = [*COLUMNS.values(), "live"]
    assert print_table(columns, agreed, answers, rules) == AGREEMENT.strip("\n").splitlines()


def test_what_both_find_wrong_is_wrong_at_the_same_step(compared):
    held = Counter()
    for case, made, verdict, right, error in compared:
        if verdict.step is not None and not right:
            assert verdict.step == due_step(case, made), (case, made, verdict, error)
            theirs = bfcl_step(made, error)
            if theirs == verdict.step:
                held[verdict.step] += 1
            else:
                assert theirs is None or contradictory(case), (case, made, verdict, error)
    print(held)
    assert held == SAME_STEP


def test_every_call_of_bfcl_is_read_back_from_its_tag(compared):
    for _, made, _, _, _ in compared:
        assert json.dumps(read_back(made.text)) == json.dumps(made.calls), made


def read_back(text):
    """Return the calls in a text as our grammar reads them, each [name, arguments]; None: unreadable."""
    try:
        return [[call.name, call.arguments] for call in read_calls(text)[0]]
    except ValueError:
        return None


def test_where_no_function_fits_text_is_right_and_any_call_is_wrong(bfcl):
    """BFCL's runner asks of such a row only whether a call was read."""
    answers, agreed, rules = Counter(), Counter(), defaultdict(Counter)
    columns = ["irrelevance", "live"]
    for column, category in zip(columns, ["irrelevance", "live_irrelevance"], strict=True):
        for row in bfcl[1](f"BFCL_v4_{category}"):
            names = [function["name"] for function in row["function"]] or ["no_such_tool"]
            call = format_call(names[0], {})
            made = [Made("text", turn["content"], []) for turn in row["question"][0]]  # somebody's words
            made += [Made("call", text, [[names[0], {}]]) for text in (call, WORDS + call)]
            made += [Made("unreadable tag", call.removesuffix("/>"), None), Made("empty answer", " ", [])]
            for answer in made:
                verdict = judge(Answer(answer.text, True, []), None)
                answers[answer.kind, column] += 1
                if (verdict.step is None) == (not answer.calls):
                    agreed[answer.kind, column] += 1
                    assert verdict.step == ("decision" if answer.calls else None), (answer, verdict)
                else:
                    rule = {"unreadable tag": "trace", "empty answer": "form"}[answer.kind]
                    rules[answer.kind][rule] += 1
    assert print_table(columns, agreed, answers, rules) == IRRELEVANCE.strip("\n").splitlines()
