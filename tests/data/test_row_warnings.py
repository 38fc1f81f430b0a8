"""What is legal in rows and yet wrong: duplicates, leaks, look-alikes, odd calls, imbalance."""

import json
import random

import pytest

from tests.support.rows import CALL, row
from train_qlora import preprocess_function
from tuner.data import chat_rows, labels, row_warnings, tool_call

LEAK = "1 leak: the prompt is also {}, so its result there says nothing (data leak)"


def user(text):
    return [{"role": "user", "content": text}]


def balanced(*rows):
    """Return the rows, numbered as lines, and many of both kinds after them: no imbalance."""
    fill = [row(f"{word} {i}{i * 7}?", CALL if i % 2 else "Да.") for i, word in enumerate("абвгд" * 6)]
    return list(enumerate([*rows, *fill], 1))


def warnings_of(*rows, **kwargs):
    warnings = row_warnings.warnings(balanced(*rows), **kwargs)
    return [f"{warning.line} {warning.kind}: {warning.text}" for warning in warnings]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([row("Мой баланс?", CALL)], []),
        (
            [row("Мой баланс?", CALL), row("мой  Баланс", "Не знаю.")],
            ["2 contradiction: same prompt as line 1, but another answer"],
        ),
        (
            [row("Мой баланс?", CALL), row("мой  Баланс", CALL)],
            ["2 duplicate: duplicate of line 1"],
        ),
        (
            [row("Сколько денег осталось на моей карте сегодня", CALL),
             row("Сколько денег осталось на моей карте сегодни", CALL)],
            ["2 near-duplicate: prompt is 95% similar to line 1"],
        ),
        (
            [row("Покaжи счёт", CALL)],
            ['1 look-alikes: turn 1: in "Покaжи" a is Latin'],
        ),
        ([row("Мой iPhone и SMS-код, Wi-Fi, IT-отдел", CALL)], []),
        (
            [row("Мой\u00a0счёт\u200b", CALL)],
            ["1 invisible: turn 1 contains invisible characters: NO-BREAK SPACE, ZERO WIDTH SPACE"],
        ),
        ([row("Семья 👨\u200d👩\u200d👧 и флаг ❤️\nда", "Да.")], []),
        (
            [row("Мой счёт ", CALL)],
            ["1 whitespace: turn 1 begins or ends with whitespace, which is not trained"],
        ),
        (
            [row("Мой счёт", f"Вот: {CALL}")],
            ["1 call: turn 2: malformed call: text around the call"],
        ),
        (
            [row("Мой счёт", CALL.replace("{}", "{"))],
            ["1 call: turn 2: malformed call: the tag is not closed"],
        ),
        (
            [row("Мой счёт", CALL.replace("{}", "[]"))],
            ["1 call: turn 2: malformed call: the arguments are not a JSON object"],
        ),
        ([row("Мой счёт", f"Смотрю.\n{CALL}\n{CALL}")], []),
        (
            [row("Мой счёт", f"{CALL}\nи ещё {CALL}")],
            ["1 call: turn 2: malformed call: text around the call"],
        ),
        (
            [row("Мой счёт", f"{CALL}\n{CALL[:-1]}")],
            ["1 call: turn 2: malformed call: the tag is not closed"],
        ),
        ([row("Мой счёт", CALL.replace('"', "'"))], ["1 call: turn 2: non-canonical call: single quotes"]),
        ([row("Первый вопрос", f"{CALL} вот", "А второй", "Да.")],
         ["1 call: turn 2: malformed call: text around the call"]),
        (
            [row("Мой счёт", CALL.replace("sensitive", "sensitve"))],
            ['1 spelling: function name "get_sensitve_data" may be a misspelling of "get_sensitive_data" '
             "(15 times)"],
        ),
        ([row("Мой счёт", CALL.replace("sensitive_data", "weather"))], []),
        (
            [row("Добрый день, как настроение", "Хорошо.")],
            [LEAK.format("a probe of compare.py")],
        ),
        (
            [row("Что там с моим заказом", CALL)],
            [LEAK.format("line 7 of the held-out rows")],
        ),
    ],
)  # fmt: skip
def test_what_is_legal_and_wrong_is_reported_with_its_line(rows, says):
    probes = [(1, user("?")), (2, user("Добрый день, как настроение?"))]
    held_out = [(7, user("Что там с моим заказом?")), (8, user("Добрый день, как настроение?"))]
    assert warnings_of(*rows, probes=probes, held_out=held_out) == says


def test_rows_with_tool_calls_are_checked_as_the_text_that_they_become(tmp_path, tokenizer):
    call = {"id": "a", "type": "function", "function": {"name": "get_sensitive_data", "arguments": "{}"}}
    asked = [{"role": "user", "content": "Мой баланс?"}, {"role": "assistant", "tool_calls": [call]}]
    results = [{"role": "tool", "tool_call_id": name, "content": f"5\u200b{name}"} for name in "ab"]
    twice = {"role": "assistant", "tool_calls": [call, {**call, "id": "b"}]}
    answer = {"role": "assistant", "content": "Пять. "}
    path = tmp_path / "rows.json"
    rows = [asked, [*asked, results[0], answer], [asked[0], twice, *results, answer]]
    path.write_text("\n".join(json.dumps({"messages": messages}) for messages in rows), encoding="utf-8")
    read = [r for _, r in chat_rows.read_rows(path)]
    assert warnings_of(row("Мой баланс?", CALL), *read) == [
        "2 duplicate: duplicate of line 1",
        "3 invisible: turn 3 contains invisible characters: ZERO WIDTH SPACE",
        "3 whitespace: turn 4 begins or ends with whitespace, which is not trained",
        "4 near-duplicate: prompt is 87% similar to line 3",
        "4 invisible: turn 3 contains invisible characters: ZERO WIDTH SPACE",
        "4 invisible: turn 4 contains invisible characters: ZERO WIDTH SPACE",
        "4 whitespace: turn 5 begins or ends with whitespace, which is not trained",
    ]
    trained = "".join(
        text for text, trained, _ in labels.pieces(read[1], tokenizer, preprocess_function) if trained
    )
    assert trained == f"{CALL}<end_of_turn>Пять.<end_of_turn>"


def test_an_argument_spelt_unlike_fifty_others_is_reported():
    calls = [row(f"вопрос {i}{i}{i}", "<tool_call name='f' arguments='{\"city\": 1}'/>") for i in range(50)]
    calls.append(row("а это опечатка", '<tool_call name="f" arguments=\'{"citi": 1}\'/>'))
    found = [w for w in warnings_of(*calls) if "spelling" in w]
    assert found == ['51 spelling: argument "citi" may be a misspelling of "city" (50 times)']


@pytest.mark.parametrize(
    ("calls", "general", "few"),
    [(20, 9, "9 of 29 rows are without"), (9, 20, "9 of 29 rows are with a"), (10, 20, None)],
)
def test_rows_of_one_kind_are_reported(calls, general, few):
    rows = [row(f"{chr(1072 + i)}{i}", CALL) for i in range(calls)]
    rows += [row(f"{chr(1072 + i)}{i} привет", "Да.") for i in range(general)]
    found = [w.text for w in row_warnings.warnings(list(enumerate(rows, 1))) if w.kind == "balance"]
    assert [text[: len(few or "")] for text in found] == ([few] if few else [])


def test_a_row_with_a_call_before_its_last_answer_is_one_with_a_call():
    rows = [row("Привет", "Да.") for _ in range(5)] + [row("Баланс", CALL, "5", "Пять.") for _ in range(5)]
    assert not [w for w in row_warnings.warnings(list(enumerate(rows, 1))) if w.kind == "balance"]


def test_near_duplicates_are_those_of_all_pairs():
    chance = random.Random(0)
    words = "мой счёт карта баланс вклад кредит лимит заказ долг покажи сколько какой"
    texts = list({" ".join(chance.choices(words.split(), k=6)) for _ in range(150)})
    texts += [text + " да" for text in texts[:40]]
    chunks = [row_warnings.chunks_of(text) for text in texts]
    alike = {}
    for j in range(len(texts)):
        for i in range(j):
            index = len(chunks[i] & chunks[j]) / len(chunks[i] | chunks[j])
            if index >= row_warnings.MIN_SIMILARITY:
                alike.setdefault(j, {})[i] = index
    found = {j: (i, index) for i, j, index in row_warnings.near_duplicates(texts)}
    assert set(found) <= set(alike)
    assert len(found) >= 0.95 * len(alike) >= 30
    assert all(alike[j][i] == index for j, (i, index) in found.items())


def tools(**parameters):
    return [{"type": "function", "function": {"name": n, "parameters": p}} for n, p in parameters.items()]


def test_every_call_of_a_row_is_compared_with_its_tools():
    declared = tools(f={"properties": {"a": {"type": "string"}}}, g=None)
    first, second = (tool_call.format_call(name, {"a": "1", "b": 2}) for name in "fg")
    rows = [
        {**row("Один вопрос", "Да.", "Второй", f"Вот:\n{first}\n{second}"), "tools": declared},
        {**row("Другое", tool_call.format_call("h", {})), "tools": declared},
        row("Третье совсем", tool_call.format_call("f", {"a": None})),
        {**row("Четвёртое дело", tool_call.format_call("f", {"a": "1"})), "tools": declared},
    ]
    assert [text for text in warnings_of(*rows) if "malformed" not in text] == [
        '1 call: turn 4: "f" is called with b, which "tools" does not declare; add it there',
        '1 call: turn 4: "g" is called with a, b, which "tools" does not declare; add it there',
        '2 call: turn 2: calls "h", which "tools" does not declare; add it there',
        '3 call: turn 2: "f" is called with null for a, as table formats fill in; leave these out '
        '(docs/rows.md has a command), or let "tools" allow null',
    ]


def test_a_call_that_is_not_trained_is_no_matter():
    untrained = row("Вопрос", CALL.replace("{}", "{"), "Ещё", CALL)
    untrained["messages"][1]["weight"] = 0
    assert warnings_of(untrained) == []


def test_a_warning_shows_the_turn_that_it_is_about():
    probe, long = "Какой у меня остаток на счёте?", "слово " * 50 + "тут\u200b место"
    turns = row(probe, "Да. ", "Мой aдрес", CALL + ".", long, "Нет.")
    about = {w.kind: w.about for w in row_warnings.warnings(balanced(turns), [(1, user(probe))])}
    assert about["leak"] == probe
    assert about["whitespace"] == "Да. "
    assert about["look-alikes"] == "Мой aдрес"
    assert about["call"] == CALL + "."
    assert about["invisible"].startswith("…")
    assert about["invisible"].endswith("тут\u200b место")
