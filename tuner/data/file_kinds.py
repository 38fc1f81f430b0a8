"""Say what a file is that is not JSON lines, with the command that makes JSON lines of it."""

import ast
import csv
import io
import json
import re
import shlex
import warnings
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

from tuner.data import conversion
from tuner.data.conversion import IN, OUT, ROW, TEXT
from tuner.system.console import printable

# By how a file begins: what it is, the module that reads it, and how. Packed files, as bytes:
PACKED = {
    b"\x1f\x8b": ("gzip", "gzip", f"gzip.open({IN})"),
    b"BZh": ("bzip2", "bz2", f"bz2.open({IN})"),
    b"\xfd7zXZ\0": ("xz", "lzma", f"lzma.open({IN})"),
    b"\x28\xb5\x2f\xfd": ("Zstandard", "pyarrow", f"pyarrow.input_stream({IN},compression='zstd')"),
}
FEATHER = "Arrow", "pyarrow.feather", f"pyarrow.feather.read_table({IN}).to_pylist()"
TABLE = "'select name from sqlite_master where type=? and name not like ? order by sql not like ?'"
QUERY = f"'select * from ['+c.execute({TABLE},['table','sqlite%','%messages%']).fetchone()[0]+']'"
TABLES = {  # as rows
    b"PAR1": ("Parquet", "pyarrow.parquet", f"pyarrow.parquet.read_table({IN}).to_pylist()"),
    b"ARROW1": FEATHER,
    b"FEA1": FEATHER,
    b"\xff\xff\xff\xff": ("Arrow", "pyarrow", f"pyarrow.ipc.open_stream({IN}).read_all().to_pylist()"),
    b"ORC": ("ORC", "pyarrow.orc", f"pyarrow.orc.read_table({IN}).to_pylist()"),
    b"SQLite format 3\0": (
        "an SQLite database",
        "sqlite3",
        f"(dict(zip([d[0] for d in q.description],v)) for c in [sqlite3.connect({IN})] "
        f"for q in [c.execute({QUERY})] for v in q)",
    ),
}
OTHERS = {
    b"\x89HDF": "HDF5",
    b"\x93NUMPY": "a NumPy array",
    b"Obj\x01": "Avro",
    b"GGUF": "a model's weights (GGUF)",
    b"%PDF": "a PDF document",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"\xd0\xcf\x11\xe0": "an old Office document",
    b"{\\rtf": "an RTF document",
    b"7z\xbc\xaf": "a 7-Zip archive",
    b"Rar!": "a RAR archive",
}
PICKLE = re.compile(rb"\x80[\x02-\x05]")
MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
TAR = slice(257, 262)  # where a tar archive says "ustar"
CYRILLIC = ("cp1251", "koi8-r", "cp866", "mac-cyrillic")
FREQUENT = set("оеаинтсрвлк")  # more than half of all letters in Russian
SAMPLE = 100_000  # bytes

KEY = re.compile(r"[A-Za-z0-9_.-]+(?: [A-Za-z0-9_.-]+)*")  # stands in a command as it is
ROW_KEYS = {"messages", "conversations", "conversation", "instruction", "prompt", "chosen", "question"}
WRAPPERS = ("data", "rows", "train", "items", "examples", "samples", "records", "instances", "dataset")
COLUMN = re.compile(r"\w[\w .-]{0,40}")
ASKED = ("user", "prompt", "question", "instruction", "input", "query", "вопрос")
ANSWERED = ("assistant", "completion", "response", "answer", "output", "target", "ответ")
YAML = re.compile(r"(?:---|%YAML.*|- *(?:messages|role|conversations):.*|messages:)\s*")
TITLE = re.compile(r"<title>(.{1,200}?)</title>", re.IGNORECASE | re.DOTALL)


def describe_bytes(data, path):
    """Return what a file is that is no UTF-8 text, and what to do; None if its beginning tells nothing."""
    for mark, kind in PACKED.items():
        if data.startswith(mark):
            return _packed(data, path, kind)
    for mark, (name, module, rows) in TABLES.items():
        if data.startswith(mark):
            return f"{name}, not JSON lines; {conversion.make_rows(path, rows, module, ROW)}"
    for mark, encoding in MARKS.items():
        if data.startswith(mark):
            return f"{encoding.upper()} text, not UTF-8; {conversion.recode(path, encoding)}"
    if data.startswith(b"PK\3\4"):
        return _zip(path)
    if data[TAR] == b"ustar":
        return f"a tar archive, not JSON lines; {conversion.unpack(path, 'tarfile')}"
    if PICKLE.match(data):
        rows = f"(lambda v: v.to_dict('records') if hasattr(v,'to_dict') else v)(pandas.read_pickle({IN}))"
        cure = conversion.make_rows(path, rows, "pandas", ROW)
        return f"a pickle, which runs what code is in it when it is read; if it is your own, {cure}"
    for mark, name in OTHERS.items():
        if data.startswith(mark):
            return f"{name}, not JSON lines; export its rows as JSON lines"
    return None


def describe_encoding(data, path):
    """Return what bytes are that are no UTF-8 text, or hold NUL, and what to do."""
    sample = data[:SAMPLE]
    if 0 in data:
        little = sample[1::2].count(0) > sample[::2].count(0)
        encoding = "utf-16-le" if little else "utf-16-be"
        if sample.count(0) > len(sample) / 8 and _decodes(data, encoding):
            return f"UTF-16 text, not UTF-8; {conversion.recode(path, encoding)}"
        return "contains a NUL character, as UTF-16 and binary files do; save the file as UTF-8"
    high = len(re.findall(rb"[\x80-\xff]", sample))
    valid = sum(len(c.encode()) for c in sample.decode("utf-8", "ignore") if ord(c) > 127)
    scores = {e: sum(c in FREQUENT for c in sample.decode(e, "ignore")) for e in CYRILLIC}
    best = max(scores, key=scores.get)
    if valid < high / 2 and scores[best] > high / 3 and _decodes(data, best):
        return f"text in {best}, as it seems, not UTF-8; {conversion.recode(path, best)}"
    return "not UTF-8 text; save the file as UTF-8"


def describe_text(text, path):
    """Return what a text is whose first line is not JSON, and what to do; None if that cannot be told."""
    first = text.lstrip().split("\n", 1)[0].rstrip()
    if first.startswith("version https://git-lfs"):
        pattern = shlex.quote(Path(path).name)
        return f"a pointer of Git LFS, not the file; in its repository: git lfs pull --include {pattern}"
    if first.startswith("<"):
        title = TITLE.search(text[:10_000])
        shown = f' ("{printable(" ".join(title[1].split()))}")' if title else ""
        kind = "an HTML page" if re.search("<!doctype html|<html", text[:1000], re.IGNORECASE) else "XML"
        return f"{kind}{shown}, not JSON lines; download the file itself: this came in its place"
    if first.startswith(("{", "[")):
        return _old_mac(text, path) or describe_value(text, path) or _python_notation(text, first, path)
    if YAML.fullmatch(first):
        rows = f"(r for v in yaml.safe_load_all({TEXT}) for r in (v if isinstance(v,list) else [v]) if r)"
        return f"YAML, not JSON lines; {conversion.make_rows(path, rows, 'yaml')}"
    return _table(text, first, path)


def describe_value(text, path):
    """Return where in a text's JSON values the rows are, and what to do; None if these are the rows."""
    begin = len(text) - len(text.lstrip())
    try:
        value, end = json.JSONDecoder().raw_decode(text, begin)
    except (ValueError, RecursionError):
        return None
    lines, rest = "\n" in text[begin:end], text[end:].lstrip()
    if isinstance(value, list):
        return _bare_messages(value, "" if lines and rest else rest[:1], path)
    if not isinstance(value, dict):
        return None
    if rest.startswith("{") and (lines or "\n" not in text[end : len(text) - len(rest)]):
        before = rf"d=json.JSONDecoder(); t={TEXT}.read(); s=re.compile(r'\s*').match; p=[0]; "
        rows = "iter(lambda: (lambda v,e: p.__setitem__(0,e) or v)(*d.raw_decode(t,s(t,p[0]).end())) "
        rows += "if s(t,p[0]).end()<len(t) else None,None)"
        what = "objects of several lines each" if lines else "several objects on a line"
        return f"{what}, not one a line; {conversion.make_rows(path, rows, 're', before=before)}"
    if rest.startswith("{"):
        keys = [key for key in value if _is_row(value[key]) and "messages" in value[key]]
        key = keys[0] if keys and KEY.fullmatch(keys[0]) else None
        if key in (None, "body"):  # of a batch of requests, which has no answers
            return None
        rows = f"(json.loads(l)['{key}'] for l in {TEXT} if l.strip())"
        return f"rows within other objects; {conversion.make_rows(path, rows)}"
    if rest.startswith(","):
        if not _is_json(f"[{text.strip().rstrip(',')}]"):
            return None
        rows = f"json.loads('['+{TEXT}.read().strip().rstrip(',')+']')"
        return f"objects with commas between them; {conversion.make_rows(path, rows)}"
    if rest:
        return None
    found = _rows_in(value, "v")
    if found is None or (found == "[v]" and not lines):
        return None
    what = "one object of several lines" if found == "[v]" else "rows within one object"
    return f"{what}, not JSON lines; {conversion.make_rows(path, found, before=f'v=json.load({TEXT}); ')}"


def _bare_messages(value, following, path):
    """Return what to do about messages without an object around them: of one conversation or of several."""
    first = value[0] if value else None
    if isinstance(first, list) and first and _is_message(first[0]) and not following:
        rows = f"({{'messages':m}} for m in json.load({TEXT}))"
    elif _is_message(first) and following in ("", "["):
        rows = f"({{'messages':json.loads(l)}} for l in {TEXT} if l.strip())"
        if not following:
            rows = f"[{{'messages':json.load({TEXT})}}]"
    else:
        return None
    return f'lists without {{"messages": …}} around them; {conversion.make_rows(path, rows)}'


def describe_folder(path):
    """Return what to do about a folder in the place of a file."""
    if Path(path, "dataset_dict.json").is_file() or Path(path, "dataset_info.json").is_file():
        rows = f"(lambda d: d if hasattr(d,'features') else d['train'])(datasets.load_from_disk({IN}))"
        return f"a folder of datasets; {conversion.make_rows(path, rows, 'datasets', ROW)}"
    return "a folder; name the file in it"


# ------------------------------------------------------------------------------------------------ packed


def _packed(data, path, kind):
    name, module, opened = kind
    if name == "gzip":
        try:
            start = zlib.decompressobj(wbits=31).decompress(data[:10_000], TAR.stop)
        except zlib.error:
            return "gzip that is damaged; download it again"
        if start[TAR] == b"ustar":
            return f"a packed tar archive; {conversion.unpack(path, 'tarfile')}"
    code = f"import {module},shutil,sys; shutil.copyfileobj({opened},open({OUT},'xb'))"
    return f"packed with {name}; {conversion.make(path, code, Path(path).with_suffix('').suffix)}"


def _zip(path):
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return "a zip archive that cannot be read; download it again"
    names = {member.filename for member in members}
    if "xl/workbook.xml" in names:
        return "an Excel workbook, not JSON lines; save its sheet as CSV UTF-8 and use that file"
    if names & {"word/document.xml", "content.xml"}:
        return "an Office document, not JSON lines; export its rows as JSON lines"
    files = [i for i, m in enumerate(members) if not m.is_dir() and not m.filename.startswith("__MACOSX/")]
    if len(files) != 1 or members[files[0]].flag_bits & 1:  # encrypted
        return f"a zip archive of {len(files)} files; {conversion.unpack(path, 'zipfile')}"
    code = f"import shutil,sys,zipfile; z=zipfile.ZipFile({IN}); "
    code += f"shutil.copyfileobj(z.open(z.infolist()[{files[0]}]),open({OUT},'xb'))"
    return f"a zip archive; {conversion.make(path, code, Path(members[files[0]].filename).suffix)}"


# ------------------------------------------------------------------------------------------------- texts


def _decodes(data, encoding):
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _old_mac(text, path):
    """Return what to do if lines end with CR alone."""
    lines = [line for line in re.split(r"\r\n?|\n", text) if line.strip()]
    if "\r" not in text.replace("\r\n", "\n").strip() or not _is_json(lines[0]):
        return None
    return f"lines that end with CR alone, as on old Macs; {conversion.recode(path, 'utf-8-sig')}"


def _is_json(text):
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _python_notation(text, first, path):
    """Return what to do about rows as Python prints them, with single quotes: one a line, or in one list."""
    if not re.match(r"[{[]\s*['{[]", text.lstrip()[:SAMPLE]):
        return None
    is_list, by_line = first.startswith("["), _is_python(first)
    if not by_line and not _is_python(text.strip()):
        return None
    rows = f"(ast.literal_eval(l) for l in {TEXT} if l.strip())"
    if not by_line:
        rows = f"[ast.literal_eval({TEXT}.read().strip())]"
    if is_list:
        rows = f"(r for v in {rows} for r in v)"
    return f"Python's notation, not JSON; {conversion.make_rows(path, rows, 'ast')}"


def _is_python(text):
    """Return whether a text, unless it is very long, is a literal of Python."""
    if len(text) > 10 * SAMPLE:
        return text[-1] in "}]"
    with suppress(ValueError, SyntaxError, MemoryError, RecursionError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd escapes
        ast.literal_eval(text)
        return True
    return False


def _rows_in(value, name):
    """Return the Python expression for the rows in a JSON object, which is called `name`; None for none."""
    key = next((key for key in value if key in ROW_KEYS), None)
    if key is not None:
        cell, cells = value[key], value.values()
        if isinstance(cell, list) and cell and not _is_message(cell[0]) and _all(cells, list):
            return f"(dict(zip({name},t)) for t in zip(*{name}.values()))"
        if isinstance(cell, dict) and "0" in cell and _all(cells, dict):
            return f"(dict(zip({name},t)) for t in zip(*(c.values() for c in {name}.values())))"
        return f"[{name}]"
    if set(value) == {"columns", "index", "data"}:
        return f"(dict(zip({name}['columns'],t)) for t in {name}['data'])"
    if value and all(_is_row(row) for row in value.values()):
        return f"{name}.values()"
    for key in sorted(value, key=lambda key: key != "train"):  # the rows of "train" before those of "test"
        inner, part = f"{name}['{key}']", value[key]
        if not KEY.fullmatch(key):
            continue
        if isinstance(part, list) and part and isinstance(part[0], dict):
            if isinstance(part[0].get("row"), dict):
                return f"(r['row'] for r in {inner})"
            if ROW_KEYS & set(part[0]) or key in WRAPPERS:
                return inner
        if isinstance(part, dict) and len(inner) < 100:
            found = _rows_in(part, inner)
            if found and not found.startswith("["):  # one row within another object is no file of rows
                return found
    return None


def _all(values, kind):
    return all(isinstance(value, kind) for value in values)


def _is_message(value):
    return isinstance(value, dict) and bool({"role", "from"} & set(value))


def _is_row(value):
    return isinstance(value, dict) and bool(ROW_KEYS & set(value)) and _rows_in(value, "v") == "[v]"


def _table(text, first, path):
    """Return what to do about CSV: the columns that are messages, or a question and its answer."""
    try:
        tables = [(next(csv.reader([first], delimiter=d)), d) for d in ",;\t"]
        header, delimiter = max(tables, key=lambda table: len(table[0]))
        lines = csv.reader(io.StringIO(text[: 10 * SAMPLE], newline=""), delimiter=delimiter)
        cells = (next(lines, []), next(lines, []))[1]
    except csv.Error:
        return None
    header = [name.strip().lower() for name in header]
    if not all(map(COLUMN.fullmatch, header)) or (len(header) < 2 and header != ["messages"]):
        return None
    what = f"CSV with the columns {printable(', '.join(header))}, not JSON lines"
    taken, row = _row_of_table(header, cells)
    if row is None:
        return f"{what}; export the rows as JSON lines of messages"
    what += f" ({' and '.join(taken)} will be taken)" * (len(taken) < len(header))
    reader = f"csv.reader(open({IN},encoding='utf-8-sig',newline=''),delimiter={delimiter!r})"
    rows = f"(r for n,r in enumerate({reader}) if n and r)"
    return f"{what}; {conversion.make_rows(path, rows, 'ast,csv', row)}"


def _row_of_table(header, cells):
    """Return ([columns that make a row], Python's expression for it), None for one if none do."""
    if "messages" in header:
        taken = [name for name in ("messages", "tools") if name in header]
        cell = "".join(cells[header.index("messages") :][:1])
        if not _is_json(cell) and not _is_python(cell):  # what NumPy prints, for one
            return taken, None
        parse, nothing = ("json.loads", "null") if _is_json(cell) else ("ast.literal_eval", "None")
        parts = [f"'{name}':{parse}(r[{header.index(name)}] or '{nothing}')" for name in taken]
        return taken, f"{{{','.join(parts)}}}"
    asked = next((i for i, name in enumerate(header) if name in ASKED), 0)
    answered = next((i for i, name in enumerate(header) if name in ANSWERED), 1)
    taken = [header[asked], header[answered]]
    if asked == answered or (len(header) > 2 and set(taken) - {*ASKED, *ANSWERED}):
        return taken, None
    turns = f"{{'role':'user','content':r[{asked}]}},{{'role':'assistant','content':r[{answered}]}}"
    return taken, f"{{'messages':[{turns}]}}"
