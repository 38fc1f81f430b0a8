"""Count how rows use each tool: how many call it, with which values, and which of these are never trained.

The last answers of held-out rows and probes ask for a tool: by these the tuned model is judged.
"""

from tuner.data import chat_text, tool_arguments, tool_call
from tuner.system.console import printable

ROWS, HELD_OUT, PROBES = "rows", "held_out", "probes"  # the three files
MAX_ARGUMENTS = 200  # of a tool; one with more takes any name
MAX_CHOICES = 20  # of an argument whose values are a closed set, of which all can be asked for
MIN_ROWS = 5  # with a value, for it to be one of a closed set that no schema names
SHOWN_TOOLS, SHOWN_ARGUMENTS = 50, 12
MAX_REFERENCES = 9  # of a schema to another, and on to the next
WIDTH = 40  # of a name
HEADER = ("tools", "rows", "held out", "probes", "values trained", "asked for", "new")


def key_of(value):
    """Return what is equal for equal texts, numbers and booleans only: 1 is 1.0, but not true."""
    return isinstance(value, bool), value


def choices(root, path):
    """Return the values, but for null, that a schema names for an argument, None if it allows others too."""
    schema = _resolved(root, root)
    for key in path:
        inner = schema.get("items") if key == "[]" else schema.get("properties", {}).get(key)
        schema = _resolved(inner, root)
    return _values_of(schema, root)


def _resolved(schema, root):
    """Return the schema that one refers to, as #/$defs/Kind, alone or in an "allOf" of one."""
    for _ in range(MAX_REFERENCES):
        schema = schema if isinstance(schema, dict) else {}
        if len(schema.get("allOf", ())) == 1:
            schema = schema["allOf"][0]
        elif "$ref" in schema:
            start, section, name = (*schema["$ref"].split("/"), "", "")[:3]
            is_known = start == "#" and section in ("$defs", "definitions")
            schema = root.get(section, {}).get(name) if is_known else {}
    return schema if isinstance(schema, dict) else {}


def _values_of(schema, root, is_branch=False):
    if "enum" in schema:
        return [value for value in schema["enum"] if value is not None]
    if "const" in schema:
        return [schema["const"]]
    kinds = schema.get("type")
    kinds = {kinds} if isinstance(kinds, str) else set(kinds or ())
    if kinds == {"null"}:
        return []
    if "boolean" in kinds and kinds <= {"boolean", "null"}:
        return [False, True]
    branches = () if is_branch else schema.get("anyOf", schema.get("oneOf", ()))
    found = [_values_of(_resolved(one, root), root, is_branch=True) for one in branches]
    return [value for values in found for value in values] if found and None not in found else None


class ArgumentUse:
    """The values of an argument, {key_of(value): value}, and how many rows train each."""

    def __init__(self):
        self.trained, self.asked, self.rows = {}, {}, {}

    def count(self, value, file):
        key = key_of(value)
        if file == ROWS:
            self.trained[key] = value
            self.rows[key] = self.rows.get(key, 0) + 1
        else:
            self.asked[key] = value

    def new(self):
        """Return the keys of the values that are asked for and not trained."""
        return self.asked.keys() - self.trained.keys()


class ToolUse:
    """What rows do with a tool.

    rows, held_out, probes: the rows of each file that call it, [(line, row), …]. declared: the first of those
    to be trained on whose "tools" have it, None if none has. schema: its first valid Schema in a row that
    calls it, or None. arguments: {keys, with "[]" for a list's items: ArgumentUse}.
    """

    def __init__(self):
        self.rows, self.held_out, self.probes = [], [], []
        self.declared, self.schema, self.arguments = None, None, {}

    def asked(self):
        """Return the rows that ask for it."""
        return self.held_out + self.probes

    def closed_values(self, path):
        """Return the trained values of an argument that are one of a closed set, or None for a free value."""
        use = self.arguments[path]
        named = choices(self.schema.root, path) if self.schema else None
        if named is not None and len(named) <= MAX_CHOICES:
            return [use.trained[key] for key in map(key_of, named) if key in use.trained]
        if self.schema or len(use.trained) > MAX_CHOICES:
            return None
        return [use.trained[key] for key, rows in use.rows.items() if rows >= MIN_ROWS]


def survey(rows, held_out=(), probes=()):
    """Return {name: ToolUse} of all tools that rows, [(line, row), …], call, or that `rows` declare."""
    tools = {}
    for file, pairs in ((ROWS, rows), (HELD_OUT, held_out), (PROBES, probes)):
        for line, row in pairs:
            declared = tool_arguments.schemas_of(row.get("tools")) or {}
            if file == ROWS:
                for name in declared:
                    tool = tools.setdefault(name, ToolUse())
                    tool.declared = tool.declared or (line, row)
            values = {}  # each once for a row
            for call in trained_calls(row) if file == ROWS else asked_calls(row):
                values.setdefault(call.name, {}).update(_values(call.arguments))
            for name in values:
                tool = tools.setdefault(name, ToolUse())
                getattr(tool, file).append((line, row))
                if not tool.schema and name in declared and not declared[name].fault:
                    tool.schema = declared[name]
                for (path, _), value in values[name].items():
                    if path in tool.arguments or len(tool.arguments) < MAX_ARGUMENTS:
                        tool.arguments.setdefault(path, ArgumentUse()).count(value, file)
    return tools


def trained_calls(row):
    """Return the Calls in the answers of a row that are trained."""
    answers = (message["content"] for message in row["messages"] if chat_text.is_trained(message))
    return [call for answer in answers for call in tool_call.calls_in(answer)]


def asked_calls(row):
    """Return the Calls in a row's last answer."""
    return tool_call.calls_in(row["messages"][-1]["content"])


def _values(arguments):
    """Return {(path, key_of(value)): value} of all texts, numbers and booleans in arguments."""
    values = {}
    for path, value in tool_arguments.nodes(arguments):
        if isinstance(value, (str, int, float)):
            values[path, key_of(value)] = value
    return values


def table(tools, is_judged=True):
    """Return the lines of a table of {name: ToolUse}: rows that call a tool, and values of its arguments.

    is_judged: whether there are held-out rows or probes; if not, the table is narrower.
    """
    names = sorted(tools, key=lambda name: -len(tools[name].rows))
    lines = [HEADER]
    for name in names[:SHOWN_TOOLS]:
        tool = tools[name]
        counts = map(len, (tool.rows, tool.held_out, tool.probes))
        lines.append((printable(name, WIDTH), *counts, "", "", ""))
        paths = list(tool.arguments)
        for path in paths[:SHOWN_ARGUMENTS]:
            use = tool.arguments[path]
            counts = map(len, (use.trained, use.asked, use.new()))
            lines.append(("  " + printable(tool_arguments.dotted(path), WIDTH - 2), "", "", "", *counts))
        if len(paths) > SHOWN_ARGUMENTS:
            lines.append((f"  … and {len(paths) - SHOWN_ARGUMENTS} more", *[""] * 6))
    if len(names) > SHOWN_TOOLS:
        lines.append((f"… and {len(names) - SHOWN_TOOLS} more", *[""] * 6))
    has_arguments = any(tool.arguments for tool in tools.values())
    columns = [1, 2, 3, 4, 5, 6] if is_judged else [1, 4]
    columns = [i for i in columns if has_arguments or i < 4]
    width = max(len(line[0]) for line in lines)
    cells = (
        (line[0].ljust(width), *(str(line[i]).rjust(len(HEADER[i]) + 2) for i in columns)) for line in lines
    )
    return ["".join(line).rstrip() for line in cells]
