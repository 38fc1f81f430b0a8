"""What a model is asked: the six probes and the held-out rows, with the answer that each must get."""

from typing import NamedTuple

from tuner.data import chat_rows, tool_call
from tuner.system.console import one_line
from tuner.system.errors import rows_error

HELD_OUT = "heldout.json"
# Four that need the call and two that do not; none of them stands in examples.json or heldout.json.
PROBES = [
    ("Какой у меня остаток на счёте?", True),
    ("Покажи мои последние покупки", True),
    ("Мой договор ещё действует?", True),
    ("Сколько я задолжал за квартиру?", True),
    ("Что такое кредитный лимит?", False),
    ("Добрый день, как настроение?", False),
]


class Expected(NamedTuple):
    """The calls that an answer must make, in any order; where plain text is expected stands None."""

    calls: list  # of tool_call.Calls, one or more
    words: bool = False  # whether there may be words beside the calls, as in the row itself


CALL = Expected([tool_call.Call("get_sensitive_data", {}, ())])


class Questions(NamedTuple):
    """The probes, then the rows of a file: lists of one length, but for `lines`, which has the rows alone."""

    data: str  # the path of the rows
    lines: list  # of that file, one for each row
    conversations: list  # each a list of messages that ends where the assistant is to answer
    expected: list  # an Expected, or None for plain text

    @property
    def sources(self):
        """Say where each question stands, for messages about it."""
        rows = [f"{one_line(str(self.data))}:{line}" for line in self.lines]
        return [f"probe {number}" for number in range(1, len(PROBES) + 1)] + rows

    @property
    def tools(self):
        """Return the names of the functions that are called in the conversations or expected to be."""
        texts = [m["content"] for c in self.conversations for m in c if m["role"] == "assistant"]
        calls = [call for expected in self.expected if expected for call in expected.calls]
        calls += [part for text in texts for part in tool_call.split_text(text)[0]]
        return list(dict.fromkeys(call.name for call in calls if isinstance(call, tool_call.Call)))


def load_questions(data):
    """Return the Questions of the probes and of the rows in the file `data`; UserError if a row is wrong."""
    rows = chat_rows.read_rows(data)
    return Questions(
        data,
        lines=[line for line, _ in rows],
        conversations=[[{"role": "user", "content": prompt}] for prompt, _ in PROBES]
        + [row["messages"][:-1] for _, row in rows],
        expected=[CALL if needs_call else None for _, needs_call in PROBES] + expected_answers(data, rows),
    )


def expected_answers(path, rows):
    """Return what the last answer of each row, [(line, row), …], is: an Expected, or None for plain text.

    Raise UserError that lists every row whose answer holds a malformed call.
    """
    expected, faults = [], []
    for line, row in rows:
        try:
            calls, words = read_calls(row["messages"][-1]["content"].strip())
            expected.append(Expected(calls, words) if calls else None)
        except ValueError as error:
            faults.append((line, f"malformed call ({error}); fix it"))
    if faults:
        raise rows_error(path, faults)
    return expected


def read_calls(text):
    """Return (calls, words): the tool_call.Calls in a text, and whether there is more than blanks between.

    Raise ValueError with the reason if any call in the text is malformed.
    """
    parts, _ = tool_call.split_text(text)
    calls = [part for part in parts if isinstance(part, tool_call.Call)]
    others = [part for part in parts if isinstance(part, str)]
    for part in others:
        opening = tool_call.OPENING.search(part)
        if opening:
            raise ValueError(tool_call.parse(part)[1] or "it is not closed")
        if calls and tool_call.looks_like_call(part):
            raise ValueError("a broken tag beside the call")
    return calls, text != text.strip() or any(part.strip() for part in others)
