"""The command that makes JSON lines of a file of another kind, as the cure of a message.

It needs only what requirements.txt installs, and writes only a file that is not there yet.
"""

from pathlib import Path

from tuner.system.commands import quote

IN, OUT = "sys.argv[1]", "sys.argv[2]"
TEXT = f"open({IN},encoding='utf-8-sig')"
# A table's row as JSON has it; its messages may be JSON text.
ROW = "{**r,'messages':json.loads(r['messages'])} if isinstance(r.get('messages'),str) else r"
VALUES = ",default=lambda v: v.tolist() if hasattr(v,'tolist') else str(v)"
# Of files that are written, and of those that are read besides.
SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".yaml", ".tar", ".txt")
OTHERS = (
    ".gz",
    ".tgz",
    ".zip",
    ".bz2",
    ".xz",
    ".zst",
    ".pkl",
    ".pickle",
    ".feather",
    ".orc",
    ".db",
    ".sqlite",
    ".yml",
)


def make_rows(path, rows, module="", row="r", before=""):
    """Return the cure that writes rows, a Python expression, as JSON lines."""
    more = VALUES * (row == ROW)
    written = f"json.dumps({row},ensure_ascii=False{more})+'\\n' for r in {rows}"
    modules = ",".join(filter(None, [module, "json,sys"]))
    return make(path, f"import {modules}; {before}open({OUT},'x',encoding='utf-8').writelines({written})")


def make(path, code, suffix=".jsonl"):
    """Return the cure that runs Python code with the file as its first argument, a new file as the second."""
    if not _is_plain(path):
        return "save it as a file with a plain name and use that"
    new = _free(path, suffix if suffix in SUFFIXES else ".jsonl")
    return f'convert it to {new} and use that: python -c "{code}" {quote(str(path))} {quote(new)}'


def _is_plain(path):
    """Return whether a command can name what is at a path: no pipe, no control characters."""
    path = str(path)
    return Path(path).exists() and path.isprintable() and not path.startswith(("/dev/", "/proc/"))


def _free(path, suffix):
    """Return a path beside the given one that nothing has yet."""
    base = Path(path)
    while base.suffix in (*SUFFIXES, *OTHERS):
        base = base.with_suffix("")
    for number in range(1, 1000):
        new = base.with_name(base.name + (f"-{number}" if number > 1 else "") + suffix)
        if not new.exists():
            return str(new)
    return str(base.with_name(base.name + "-new" + suffix))


def recode(path, encoding):
    """Return the cure that writes a text of another encoding, or of other line ends, as UTF-8."""
    code = f"import sys; open({OUT},'x',encoding='utf-8').write(open({IN},encoding='{encoding}').read())"
    return make(path, code, Path(path).suffix)


def unpack(path, module):
    """Return the cure that unpacks an archive with zipfile or tarfile into a new folder."""
    if not _is_plain(path):
        return "unpack it and use the file in it"
    folder = _free(path, "")
    quoted = f"{quote(str(path))} {quote(folder)}"
    return f"unpack it and use the file of rows in {folder}: python -m {module} -e {quoted}"
