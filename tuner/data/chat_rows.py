"""Chat Messages JSON: read rows, or report every mistake by file and line."""

from tuner.data import chat_text, json_lines, row_faults
from tuner.system.errors import rows_error


def validate_and_render(messages, names=None):
    """Returns [{"role", "content": str}, …]: messages as the model learns and reads them, calls as text.

    An assistant's tool_calls become a tag each (tool_call.write), on lines of their own after its words; the
    results of its calls become one user turn, a tag each (tool_call.write_result), in the order of the calls,
    and what the user says right after them follows in that turn, as it stands: only results are escaped.
    names: of the tools that may be called (names_of), None for any. Keys that no role has are ignored.
    Raises ValueError for messages that are at fault, all faults in it as lines `message 3: what is wrong;
    what to do`; who speaks last is not looked at.
    """
    faults = list(row_faults.conversation_faults(messages, names, strict=False))
    if faults:
        raise ValueError("\n".join(faults))
    return chat_text.render_messages(messages)


def read_rows(path):
    """Returns [(line, row), …] of a file: JSON lines or one JSON array, UTF-8 with or without BOM.

    A row is {"messages": [{"role", "content": str}, …]}, whatever form it has in the file (see as_text).
    Raises UserError that lists every row in error; a row that is not perfect is never skipped or mended.
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
