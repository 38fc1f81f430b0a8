"""Chat Messages JSON: read rows, or report every mistake by file and line."""

from tuner.data import chat_text, json_lines, row_faults
from tuner.system.errors import rows_error


def validate_and_render(messages, names=None):
    """Return [{"role", "content": str}, …]: messages as the model learns and reads them, calls as text.

    Each of an assistant's tool_calls becomes a tag (tool_call.format_call) on its own line after the text.
    The results of its calls become one user turn, a tag each (tool_call.format_result), in the order of the
    calls; what the user says right after them follows in that turn unchanged: only results are escaped.
    names: of the tools that may be called (row_faults.declared_names), None for any. Unknown keys are
    ignored. Raise ValueError with a line for each fault, `message 3: what is wrong; what to do`; the role of
    the last message is not checked.
    """
    faults = list(row_faults.conversation_faults(messages, names, strict=False))
    if faults:
        raise ValueError("\n".join(faults))
    return chat_text.render_messages(messages)


def read_rows(path):
    """Return [(line, row), …] of a file: JSON lines or one JSON array, UTF-8 with or without BOM.

    A row is {"messages": [{"role", "content": str}, …]}, whatever its form in the file (validate_and_render).
    Raise UserError that lists every row in error; no row is skipped or repaired silently.
    """
    rows, errors = [], []
    for line, value, fault in json_lines.read_values(path):
        faults = [fault] if fault else list(row_faults.faults_of_row(value))
        errors += [(line, text) for text in faults]
        rows.append((line, faults or {"messages": chat_text.render_messages(value["messages"])}))
    if errors:
        raise rows_error(path, errors)
    if not rows:
        raise rows_error(path, [(1, "the file has no rows; put one JSON object on each line")])
    return rows
