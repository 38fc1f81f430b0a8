"""Chat Messages JSON: read rows, or report every mistake by file and line."""

import hashlib

from tuner.data import chat_text, json_lines, openai_shape, row_faults
from tuner.system.errors import rows_error


class Rows(list):
    """The rows of a file, {"messages": […]} each, and "tools" where the file declares them.

    Messages are as validate_and_render returns them, up to the last answer that is trained.
    lines: the line on which each row begins. sha256: of the file's bytes. ignored_keys: those in the file
    that decide nothing.
    """

    def __init__(self, rows, lines, sha256, ignored_keys):
        super().__init__(rows)
        self.lines, self.sha256, self.ignored_keys = lines, sha256, ignored_keys


def validate_and_render(messages, names=None):
    """Return [{"role", "content": str}, …]: messages as the model learns and reads them, calls as text.

    Each of an assistant's tool_calls becomes a tag (tool_call.format_call) on its own line after the text; an
    assistant turn that is not trained has "weight" 0. The results of its calls follow as "tool" messages with
    the function's "name", in the order of the calls: the chat template writes them, told apart from what a
    user says. names: of the tools that may be called (row_faults.declared_names), None for any. Keys that
    decide nothing are ignored. Raise ValueError with a line for each fault, `message 3: what is wrong; what
    to do`; the role of the last message is not checked.
    """
    messages = openai_shape.simplify_messages(messages, ignored={})
    faults = list(row_faults.conversation_faults(messages, names))
    if faults:
        raise ValueError("\n".join(faults))
    return chat_text.render_messages(messages)


def load(path, flag="--data", more_faults=None):
    """Return the Rows of a file: JSON lines or one JSON array, UTF-8 with or without BOM; it is read once.

    flag: the flag that names the file. more_faults: a function of a row that returns what else is wrong with
    it. Raise UserError that lists every row in error; no row is skipped or repaired silently.
    """
    data = json_lines.read_bytes(path, flag)
    rows, lines, errors, ignored = [], [], [], {}
    for line, value, fault in json_lines.parse_values(data, path):
        if isinstance(value, dict) and "messages" in value:
            value = openai_shape.simplify_row(value, ignored)
        faults = [fault] if fault else list(row_faults.faults_of_row(value))
        row = None if faults else _render(value)
        if row and more_faults:
            faults = more_faults(row)
        errors += [(line, text) for text in faults]
        if not faults:
            rows.append(row)
            lines.append(line)
    if errors:
        raise rows_error(path, errors)
    if not rows:
        raise rows_error(path, [(1, "the file has no rows; put one JSON object on each line")])
    return Rows(rows, lines, hashlib.sha256(data).hexdigest(), list(ignored))


def _render(row):
    messages = chat_text.cut_after_answers(chat_text.render_messages(row["messages"]))
    return {"messages": messages, **({"tools": row["tools"]} if "tools" in row else {})}


def read_rows(path):
    """Return [(line, row), …] of a file; raise as load does."""
    rows = load(path)
    return list(zip(rows.lines, rows, strict=True))
