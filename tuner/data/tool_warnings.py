"""Warn of tools that few rows train, that are asked for but not trained, or that nothing tells how well."""

import json

from tuner.data import tool_arguments, tool_survey
from tuner.data.row_warnings import RowWarning
from tuner.data.tool_survey import HELD_OUT, PROBES
from tuner.system.console import printable

MIN_TOOL_ROWS = 10  # that call a tool


def warnings(tools, held_out, probes):
    """Return [RowWarning, …] of tools, {name: ToolUse}, and of the calls that are asked for.

    held_out, probes: [(line, row), …].
    """
    found = []
    for name, tool in tools.items():
        found += warn_of_counts(name, tool, bool(held_out or probes))
        if tool.rows and tool.asked():
            for path in tool.arguments:
                found += warn_of_values(name, tool, path)
    for file, rows in ((HELD_OUT, held_out), (PROBES, probes)):
        for line, row in rows:
            found += warn_of_asked(line, row, file, tools)
    return found


def warn_of_counts(name, tool, is_judged):
    """Yield warnings of a tool that few rows train, or that is trained but not judged, or judged alone."""
    shown, count = f'"{printable(name)}"', len(tool.rows)
    first = tool.rows[0] if tool.rows else tool.declared
    if first and not count:
        text = f'"tools" declares {shown}, but no row calls it; write {MIN_TOOL_ROWS} rows or more that do'
        yield RowWarning(first[0], "tool", f"{text}, or remove it", row=first[1])
    elif count < MIN_TOOL_ROWS and first:
        rows = "1 row calls" if count == 1 else f"{count} rows call"
        text = f"only {rows} {shown}, too few to learn it; write {MIN_TOOL_ROWS} or more"
        yield RowWarning(first[0], "tool", text, row=first[1])
    if count and is_judged and not tool.asked():
        text = f"no held-out row or probe calls {shown}, so nothing says whether it was learned; add some"
        yield RowWarning(first[0], "tool", text, row=first[1])
    for file, rows in ((HELD_OUT, tool.held_out), (PROBES, tool.probes)):
        if rows and not count:
            more = f" ({len(rows)} rows of this file call it)" if len(rows) > 1 else ""
            cure = f"add rows that call it, remove this, or name another file with --{file.replace('_', '-')}"
            text = f"calls {shown}, which is never trained{more}; {cure}"
            yield RowWarning(rows[0][0], "tool", text, row=rows[0][1], file=file)


def warn_of_values(name, tool, path):
    """Yield a warning if what is asked for does not tell whether the values of an argument were learned."""
    use, (line, row) = tool.arguments[path], tool.rows[0]
    if not use.trained:
        return
    shown, argument = f'"{printable(name)}"', tool_arguments.dotted(path)
    closed, asked, text = tool.closed_values(path), set(use.asked), None
    if closed is not None:
        if missing := [value for value in closed if tool_survey.key_of(value) not in asked]:
            values = _show(missing)
            text = f"no held-out row or probe calls {shown} with {argument} {values}; add some that do"
    elif not asked:
        text = f"no held-out row or probe calls {shown} with {argument}; add some that do"
    elif not use.new():
        values = _show(use.asked.values())
        text = f"every value of {argument} that held-out rows and probes call {shown} with is trained too"
        text += f" ({values}), so a model that learned these by heart passes; ask for new ones"
    if text:
        yield RowWarning(line, "values", text, row=row)


def warn_of_asked(line, row, file, tools):
    """Yield warnings of a row's last calls, by its own "tools", or by those of the rows to be trained on."""
    own = tool_arguments.schemas_of(row.get("tools"))
    turn, text = len(row["messages"]), row["messages"][-1]["content"]
    for call in tool_survey.asked_calls(row):
        declared = own
        if own is None and tools[call.name].schema:
            declared = {call.name: tools[call.name].schema}
        for fault in tool_arguments.faults(call.name, call.arguments, declared):
            yield RowWarning(line, "call", f"turn {turn}: {fault}", text, row, file)


def _show(values):
    """Return the first few of many values as text."""
    return tool_arguments.join([printable(json.dumps(value, ensure_ascii=False)) for value in values])
