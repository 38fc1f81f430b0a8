"""Judge an answer in steps: call or text, readable, by the names of the tools, by their arguments."""

import json
from collections import Counter, defaultdict, deque
from typing import NamedTuple

from tuner.data import tool_call
from tuner.inference.probes import MAX_NEW_TOKENS, read_calls
from tuner.system.console import printable

MATCHED = 30  # calls of one tool in one answer that are matched by their keys; those beyond are in order
SHOWN = 3  # differences between arguments, or calls, that a text names
WIDTH = 40  # characters of a name or value in a reason


class Answer(NamedTuple):
    text: str
    ended: bool  # by itself, within the tokens that it may have
    ids: list  # of its tokens, without the end token


class Verdict(NamedTuple):
    step: str | None  # what is wrong first: "decision", "form", "name" or "arguments"; None: nothing is
    reason: str | None  # in words; None if nothing is wrong
    due: bool  # whether a call was due
    called: bool  # whether the answer has any trace of a call
    pairs: list  # [(due Call or None, made Call or None), …]; [] where there are no calls or unreadable ones
    faults: tuple = ()  # of form: "parser_lost", "text_around", "truncated", "unfit"


def judge(answer, expected, limit=MAX_NEW_TOKENS):
    """Return the Verdict on an Answer where `expected` is a probes.Expected, or None for text.

    limit: the tokens that the answer may have, for the reason. Calls that are due are matched without order.
    """
    truncated = [] if answer.ended else [f"truncated at {limit} tokens"]
    called = tool_call.looks_like_call(answer.text)
    calls, words, unreadable = [], False, None
    if called:
        try:
            calls, words = read_calls(answer.text)
            unreadable = None if calls else "a broken tag"
        except ValueError as error:
            unreadable = str(error)
    due = expected.calls if expected else []
    pairs = [] if unreadable else match_calls(due, calls)
    if not expected and called:
        made = "an unreadable call" if unreadable else _names(calls)
        return Verdict("decision", f"{made}, not text", False, True, pairs)
    if not expected:
        unfit = truncated or ([] if answer.text.strip() else ["an empty answer"])
        return Verdict(*_form(unfit), False, False, [], ("unfit",) if unfit else ())
    if not called:
        made = "text" if answer.text.strip() else "an empty answer"
        return Verdict("decision", f"{made}, not {_names(due)}", True, False, pairs)
    around = ["text around the call"] if words and not (expected.words or unreadable) else []
    reasons = {"parser_lost": unreadable, "text_around": around, "truncated": truncated}
    faults = tuple(name for name, reason in reasons.items() if reason)
    if unreadable:
        step, reason = _form([unreadable, *truncated])
    elif any(None in pair or pair[0].name != pair[1].name for pair in pairs):
        step, reason = "name", "; ".join([f"{_names(calls)}, not {_names(due)}", *truncated])
    elif differences := [text for pair in pairs for text in _differences(*pair)]:
        more = len(differences) - SHOWN
        step, reason = "arguments", "; ".join(differences[:SHOWN] + [f"and {more} more"] * (more > 0))
    else:
        step, reason = _form(around + truncated)
    return Verdict(step, reason, True, True, pairs, faults)


def _form(faults):
    return ("form", "; ".join(faults)) if faults else (None, None)


# ---------------------------------------------------------------------------------- equal, and matched


def canonical(value):
    """Return what is the same for two JSON values if, and only if, they are equal.

    1 is 1.0, as in JSON Schema, and not true; the order of keys is nothing. Nesting may be of any depth.
    """
    tokens, left = [], [value]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            tokens.append(("object", len(item)))
            for key in sorted(item, reverse=True):
                left += [item[key], key]
        elif isinstance(item, list):
            tokens.append(("array", len(item)))
            left += reversed(item)
        else:
            kind = type(item).__name__
            tokens.append(("number" if kind in ("int", "float") else kind, item))
    return tuple(tokens)


def equal_keys(due, made):
    """Return how many keys at the top of two calls' arguments are equal, and their values too."""
    return len(_items(due) & _items(made))


def _items(call):
    return {(key, canonical(value)) for key, value in call.arguments.items()}


def same_call(due, made):
    return due.name == made.name and canonical(due.arguments) == canonical(made.arguments)


def match_calls(due, made):
    """Return [(Call or None, Call or None), …]: calls that are due and made, matched without order.

    Equal ones first, then those of one tool with most keys equal, then those of different tools; None stands
    for what has no counterpart.
    """
    equals, pairs = defaultdict(list), []
    for call in reversed(made):
        equals[call.name, canonical(call.arguments)].append(call)
    left = defaultdict(lambda: ([], []))  # by name: the due and the made ones that are not matched yet
    for call in due:
        if same := equals.get((call.name, canonical(call.arguments))):
            pairs.append((call, same.pop()))
        else:
            left[call.name][0].append(call)
    for (name, _), calls in reversed(equals.items()):
        left[name][1].extend(reversed(calls))
    others = [], []
    for of_one_tool in left.values():
        matched, *rest = _match_by_keys(*of_one_tool)
        pairs += matched
        for calls, more in zip(others, rest, strict=True):
            calls += more
    return pairs + _in_order(*others)


def _match_by_keys(due, made):
    """Return (pairs, due calls left, made calls left) of calls of one tool: most equal keys first."""
    items = [[_items(call) for call in calls[:MATCHED]] for calls in (due, made)]
    scores = [(-len(a & b), i, j) for i, a in enumerate(items[0]) for j, b in enumerate(items[1])]
    chosen, taken = {}, set()
    for _, i, j in sorted(scores):
        if i not in chosen and j not in taken:
            chosen[i] = j
            taken.add(j)
    pairs = [(due[i], made[j]) for i, j in sorted(chosen.items())]
    due = [call for i, call in enumerate(due) if i not in chosen]
    made = [call for j, call in enumerate(made) if j not in taken]
    count = min(len(due), len(made))
    return pairs + _in_order(due[:count], made[:count]), due[count:], made[count:]


def _in_order(due, made):
    longest = max(len(due), len(made))
    due, made = (calls + [None] * (longest - len(calls)) for calls in (due, made))
    return list(zip(due, made, strict=True))


# ------------------------------------------------------------------------------------------ for people


def describe_call(call):
    """Return a call in short, as get_balance(account="card"), not cut."""
    return f"{call.name}({', '.join(f'{key}={_json(value)}' for key, value in call.arguments.items())})"


def describe_answer(text):
    """Return an answer with its calls in short; what is unreadable stays as it is."""
    parts, _ = tool_call.split_text(text)
    return "".join(part if isinstance(part, str) else describe_call(part) for part in parts)


def _names(calls):
    """Return the names of the tools in calls, each with how often it is called."""
    counts = sorted(Counter(call.name for call in calls).items())
    names = (f"{printable(name, WIDTH)}{f' ×{count}' * (count > 1)}" for name, count in counts)
    return printable(" and ".join(names), 100)


def _differences(due, made):
    """Return in what the arguments of two calls of one tool differ: a text for each key, nested ones too."""
    texts, left = [], deque([("", due.arguments, made.arguments)])
    while left:
        path, expected, given = left.popleft()
        for key in [*expected, *(key for key in given if key not in expected)]:
            place = path if len(path) > WIDTH else f"{path}{'.' * bool(path)}{key}"
            values = [side[key] for side in (given, expected) if key in side]
            if all(isinstance(value, dict) for value in values) and len(values) == 2:
                left.append((place, values[1], values[0]))
                continue
            if len(values) == 2 and canonical(values[0]) == canonical(values[1]):
                continue
            shown = _shorten(values)
            place = printable(place, WIDTH)
            if len(values) == 2:
                text = f"{place} is {shown[0]}, not {shown[1]}"
            elif key in expected:
                text = f"{place} is missing ({shown[0]} is due)"
            else:
                text = f"{place} is {shown[0]}, and is not due"
            texts.append(f"{printable(due.name, WIDTH)}: {text}")
    return texts


def _shorten(values):
    """Return values as JSON of at most WIDTH characters each, in which they can be told apart."""
    texts = [_json(value) for value in values]
    if len({"".join(filter(str.isprintable, text)) for text in texts}) < len(texts):
        texts = [_json(value, ensure_ascii=True) for value in values]
    if len(texts) > 1 and max(map(len, texts)) > WIDTH:
        pairs = enumerate(zip(*texts, strict=False))
        same = next((i for i, (a, b) in pairs if a != b), min(map(len, texts)))
        if same > WIDTH // 2:
            texts = ["…" + text[same - WIDTH // 4 :] for text in texts]
    return [printable(text, WIDTH) for text in texts]


def _json(value, ensure_ascii=False):
    try:
        return json.dumps(value, ensure_ascii=ensure_ascii)
    except RecursionError:
        return "…"
