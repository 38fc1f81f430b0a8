"""What a model is asked: the six probes and the held-out rows, with the answer that each must get."""

from typing import NamedTuple

from tuner.data import chat_rows, chat_text, tool_call
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
CALL = tool_call.Call("get_sensitive_data", {}, ())


class Questions(NamedTuple):
    """The probes, then the rows of a file: lists of one length, but for `lines`, which has the rows alone."""

    data: str  # the path of the rows
    lines: list  # of that file, one for each row
    conversations: list  # each a list of messages that ends where the assistant is to answer
    expected: list  # a tool_call.Call, or None for plain text

    @property
    def sources(self):
        """Say where each question stands, for messages about it."""
        rows = [f"{self.data}:{line}" for line in self.lines]
        return [f"probe {number}" for number in range(1, len(PROBES) + 1)] + rows


def load_questions(data):
    """Return the Questions of the probes and of the rows in the file `data`; UserError if a row is wrong."""
    rows = chat_rows.read_rows(data)
    return Questions(
        data,
        lines=[line for line, _ in rows],
        conversations=[[{"role": "user", "content": prompt}] for prompt, _ in PROBES]
        + [row["messages"][:-1] for _, row in rows],
        expected=[CALL if needs_call else None for _, needs_call in PROBES]
        + [expected_call(data, line, row["messages"]) for line, row in rows],
    )


def expected_call(path, line, messages):
    """Return the call that a row's last answer is, None if it is text; UserError for a malformed call."""
    if not chat_text.is_call(messages):
        return None
    call, reason = tool_call.parse(messages[-1]["content"].strip())
    if call is None:
        raise rows_error(path, [(line, f"malformed call ({reason}); fix it")])
    return call
