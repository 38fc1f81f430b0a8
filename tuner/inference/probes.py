"""What a model is asked, the probes and the held-out rows, and the answer that each must get.

Both are files of rows, as those that are trained on: the turns before a row's last answer are asked, and that
answer says what is due.
"""

from typing import NamedTuple

from tuner.data import chat_rows, tool_call
from tuner.system.errors import UserError, join_errors

HELD_OUT = "heldout.json"  # the default paths, relative to the working folder
PROBES = "probes.json"
MAX_NEW_TOKENS = 80  # of an answer that is judged, if its row's own answer needs no more


class Expected(NamedTuple):
    """The calls that an answer must make, in any order; where plain text is expected stands None."""

    calls: list  # of tool_call.Calls, one or more
    words: bool = False  # whether there may be words beside the calls, as in the row itself


class Questions(NamedTuple):
    """What the rows of one file ask: lists of one length, but for `tools`."""

    path: str
    lines: list  # of that file, on which each row begins
    conversations: list  # each a list of rendered messages that ends where the assistant is to answer
    expected: list  # an Expected, or None for plain text
    answers: list  # the text of each row's own last answer
    tools: list  # entries of OpenAI's "tools", one for each name that is declared or called

    @property
    def max_new_tokens(self):
        """Return how long each answer may be: MAX_NEW_TOKENS, or more where the row's own may be longer.

        How many tokens that has is estimated from its characters, which is too many and the same for every
        tokenizer: a call may have one for each, words have one for two at most.
        """
        pairs = zip(self.answers, self.expected, strict=True)
        return [max(MAX_NEW_TOKENS, len(text) // (1 if expected else 2)) for text, expected in pairs]


def load_questions(path, flag="--data"):
    """Return the Questions of the file `path`, which `flag` names.

    Raise UserError that lists every row that is wrong, or whose answer holds a malformed call.
    """
    rows = chat_rows.load(path, flag, answer_faults)
    conversations = [row["messages"] for row in rows]
    answers = [messages[-1]["content"].strip() for messages in conversations]
    return Questions(
        path=str(path),
        lines=rows.lines,
        conversations=[messages[:-1] for messages in conversations],
        expected=list(map(expected_answer, answers)),
        answers=answers,
        tools=tools_of(rows),
    )


def load_all(*pairs):
    """Return the Questions of several files, given as (path, flag); raise one UserError for all faults."""
    files, errors = [], []
    for path, flag in pairs:
        try:
            files.append(load_questions(path, flag))
        except UserError as error:
            errors.append(error)
    if errors:
        raise join_errors(errors)
    return files


def answer_faults(row):
    """Return what keeps a row's last answer from being judged by, as a list of texts."""
    try:
        expected_answer(row["messages"][-1]["content"].strip())
    except ValueError as error:
        return [f"malformed call ({error}); fix it"]
    return []


def expected_answer(text):
    """Return what a row's answer says is due, an Expected or None for text; raise as read_calls does."""
    calls, words = read_calls(text)
    return Expected(calls, words) if calls else None


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


def tools_of(rows):
    """Return the entries of OpenAI's "tools" for rows: as declared first, then those only called."""
    tools = {}
    for row in rows:
        for tool in row.get("tools") or []:
            function = {key: value for key, value in tool["function"].items() if value is not None}
            tools.setdefault(function["name"], _tool(**function))
    texts = (m["content"] for row in rows for m in row["messages"] if m["role"] == "assistant")
    for text in texts:
        for call in tool_call.calls_in(text):
            tools.setdefault(call.name, _tool(name=call.name))
    return list(tools.values())


def merge_tools(*files):
    """Return the tools of several Questions, each name once: as it is declared, if it is anywhere."""
    tools = {}
    for tool in sorted((t for questions in files for t in questions.tools), key=_is_bare):
        tools.setdefault(tool["function"]["name"], tool)
    return list(tools.values())


def _tool(**function):
    """Return an entry of OpenAI's "tools"; some servers want "parameters" where there are none."""
    empty = {"type": "object", "properties": {}}
    return {"type": "function", "function": {"name": function["name"], "parameters": empty, **function}}


def _is_bare(tool):
    return tool == _tool(name=tool["function"]["name"])
