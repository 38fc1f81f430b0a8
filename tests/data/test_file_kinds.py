"""Files of other kinds than JSON lines are named, and the command that is printed makes rows of them."""

import bz2
import csv
import gzip
import io
import json
import lzma
import pickle
import pprint
import re
import shlex
import sqlite3
import subprocess
import sys
import tarfile
import zipfile

import datasets
import pandas
import pyarrow
import pyarrow.feather
import pyarrow.orc
import pyarrow.parquet
import pytest
import yaml

from tests.support.rows import CALL, row
from train_qlora import load_data
from tuner.system.errors import UserError

ROWS = [row("Сколько у меня «денег»?", CALL), row('Что такое "кешбэк"?\nИ бонусы?', "Обычно это возврат.")]
PAIRS = [{"вопрос": r["messages"][0]["content"], "answer": r["messages"][1]["content"]} for r in ROWS]
LINES = "\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS) + "\n"
COLUMNS = {"messages": [r["messages"] for r in ROWS]}
FRAME = pandas.DataFrame(COLUMNS)
TEXTS = [{"messages": json.dumps(r["messages"], ensure_ascii=False), "id": 5} for r in ROWS]


def written(write, *arguments, **options):
    buffer = io.BytesIO()
    write(*arguments, buffer, **options)
    return buffer.getvalue()


def table(rows=ROWS):
    return pyarrow.Table.from_pylist(rows)


def stream():
    buffer = io.BytesIO()
    with pyarrow.ipc.new_stream(buffer, table().schema) as writer:
        writer.write_table(table())
    return buffer.getvalue()


def zipped(names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, LINES)
    return buffer.getvalue()


def tar(mode):
    buffer, data = io.BytesIO(), LINES.encode()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        member = tarfile.TarInfo("rows.jsonl")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def database(path):
    connection = sqlite3.connect(path)
    connection.execute("create table other (id)")
    connection.execute("create table chat (id, messages)")
    connection.executemany("insert into chat values (:id, :messages)", TEXTS)
    connection.commit()
    return path.read_bytes()


def as_csv(rows, **options):
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, rows[0], **options)
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode("utf-8-sig")


def indented(value, indent=1):
    return json.dumps(value, ensure_ascii=False, indent=indent).encode()


KINDS = {  # name of the file: (its bytes, what it is said to be)
    "rows.jsonl.gz": (gzip.compress(LINES.encode()), "packed with gzip"),
    "named as if not packed.json": (gzip.compress(LINES.encode()), "packed with gzip"),
    "rows.json.bz2": (bz2.compress(LINES.encode()), "packed with bzip2"),
    "rows.xz": (lzma.compress(LINES.encode()), "packed with xz"),
    "rows.zst": (pyarrow.compress(LINES.encode(), "zstd", asbytes=True), "packed with Zstandard"),
    "rows.zip": (zipped(["rows/", "__MACOSX/._r.jsonl", "rows/$(it's) мои.jsonl"]), "a zip archive"),
    "rows.parquet": (written(pyarrow.parquet.write_table, table()), "Parquet"),
    "texts.parquet": (written(pyarrow.parquet.write_table, table(TEXTS)), "Parquet"),
    "rows.feather": (written(pyarrow.feather.write_feather, table()), "Arrow"),
    "data-00000-of-00001.arrow": (stream(), "Arrow"),
    "rows.orc": (written(pyarrow.orc.write_table, table()), "ORC"),
    "rows.pkl": (pickle.dumps(ROWS), "a pickle, which runs what code"),
    "frame.pkl": (pickle.dumps(pandas.DataFrame(ROWS)), "a pickle, which runs what code"),
    "utf16.json": (LINES.encode("utf-16"), "UTF-16 text"),
    "utf16be.json": (b"\xfe\xff" + LINES.encode("utf-16-be"), "UTF-16 text"),
    "utf16 without a mark.json": (LINES.encode("utf-16-le"), "UTF-16 text"),
    "utf32.json": (LINES.encode("utf-32"), "UTF-32 text"),
    "cp1251.json": (LINES.encode("cp1251"), "text in cp1251, as it seems"),
    "koi8.json": (LINES.replace("«", "").replace("»", "").encode("koi8-r"), "text in koi8-r, as it seems"),
    "mac.json": (LINES.replace("\n", "\r").encode(), "lines that end with CR alone"),
    "it's mine, $HOME.json": (LINES.replace("\n", "\r").encode(), "lines that end with CR alone"),
    "one.json": (indented(ROWS[0]), "one object of several lines"),
    "several.json": (b"\n".join(indented(r) for r in ROWS), "objects of several lines each"),
    "several flat.json": (b"\n\n".join(indented(r, 0) for r in ROWS), "objects of several lines each"),
    "no line ends.json": (LINES.replace("}\n", "}").encode(), "several objects on a line"),
    "commas.json": (LINES.replace("}\n", "},\n").encode(), "objects with commas between them"),
    "data.json": (indented({"data": ROWS}), "rows within one object"),
    "data in one line.json": (indented({"version": 1, "rows": ROWS}, None), "rows within one object"),
    "split.json": (indented({"test": ROWS[:1], "train": ROWS}), "rows within one object"),
    "hub.json": (indented({"rows": [{"row_idx": 1, "row": r} for r in ROWS]}), "rows within one object"),
    "deep.json": (indented({"result": {"page 1": {"items": ROWS}}}), "rows within one object"),
    "numbered.json": (indented({str(i): r for i, r in enumerate(ROWS)}), "rows within one object"),
    "columns.json": (indented(COLUMNS), "rows within one object"),
    "pandas.json": (pandas.DataFrame(COLUMNS).to_json().encode(), "rows within one object"),
    "pandas split.json": (
        pandas.DataFrame(COLUMNS).to_json(orient="split").encode(),
        "rows within one object",
    ),
    "pandas table.json": (
        pandas.DataFrame(COLUMNS).to_json(orient="table").encode(),
        "rows within one object",
    ),
    "within.json": (
        "\n".join(json.dumps({"id": 1, "row": r}) for r in ROWS).encode(),
        "rows within other objects",
    ),
    "bare.json": (indented([r["messages"] for r in ROWS]), "lists without"),
    "bare lines.json": ("\n".join(json.dumps(r["messages"]) for r in ROWS).encode(), "lists without"),
    "one bare.json": (indented(ROWS[0]["messages"]), "lists without"),
    "repr.json": ("\n".join(map(repr, ROWS)).encode(), "Python's notation"),
    "repr list.json": (repr(ROWS).encode(), "Python's notation"),
    "pprint.json": (pprint.pformat(ROWS).encode(), "Python's notation"),
    "rows.yaml": (yaml.safe_dump(ROWS, allow_unicode=True).encode(), "YAML"),
    "documents.yaml": (yaml.safe_dump_all(ROWS, allow_unicode=True, explicit_start=True).encode(), "YAML"),
    "pairs.csv": (as_csv(PAIRS), "CSV with the columns вопрос, answer"),
    "pairs;.csv": (as_csv(PAIRS, delimiter=";"), "CSV with the columns вопрос, answer"),
    "pairs.tsv": (as_csv(PAIRS, delimiter="\t"), "CSV with the columns вопрос, answer"),
    "texts.csv": (as_csv(TEXTS), "CSV with the columns messages, id"),
    "tools.csv": (as_csv([{"tools": "", **t} for t in TEXTS]), "CSV with the columns tools, messages, id"),
    "repr.csv": (
        as_csv([{"id": 1, "messages": str(r["messages"])} for r in ROWS]),
        "CSV with the columns id, mes",
    ),
}


def refusal(path):
    with pytest.raises(UserError) as caught:
        load_data(path)
    line = str(caught.value)
    assert line.isprintable(), "one line"
    return re.sub(r"^:\d+: ", "", line.removeprefix(str(path)))


def run_code(command, monkeypatch):
    """Run a command `python -c …` as a shell would, but in this process."""
    assert not set("$`!") & set(command.split('" ')[0]), "a shell would read more into it"
    python, flag, code, *arguments = shlex.split(command)
    assert (python, flag) == ("python", "-c")
    monkeypatch.setattr(sys, "argv", ["-c", *arguments])
    exec(code, {})
    return arguments[1]


@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_another_kind_is_named_and_its_command_makes_rows(name, tmp_path, monkeypatch):
    data, says = KINDS[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(data)
    text = refusal(name)
    assert text.startswith(says)
    new = run_code(text[text.index("python -c") :], monkeypatch)
    expected = ROWS[:1] if name.startswith("one") else ROWS
    if name == "koi8.json":
        expected = json.loads(json.dumps(ROWS, ensure_ascii=False).replace("«", "").replace("»", ""))
    assert load_data(new) == expected
    assert (tmp_path / name).read_bytes() == data


def test_a_database_and_a_folder_of_datasets_become_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    database(tmp_path / "rows.db")
    datasets.Dataset.from_list(TEXTS).save_to_disk("saved")
    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk("splits")
    for name, says in ("rows.db", "an SQLite"), ("saved", ": a folder of"), ("splits", ": a folder of"):
        text = refusal(name)
        assert text.startswith(says)
        assert load_data(run_code(text[text.index("python -c") :], monkeypatch)) == ROWS


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("several.zip", zipped(["a.jsonl", "b.jsonl"])),
        ("rows.tar", tar("w")),
        ("rows.tar.gz", tar("w:gz")),
        ("it's.jsonl", LINES.replace("\n", "\r").encode()),
    ],
)
def test_a_command_works_as_it_is_typed(name, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(data)
    command = refusal(name).split(": ", 1)[1]
    command = command.replace("python ", f"{shlex.quote(sys.executable)} ", 1)
    subprocess.run(["bash", "-c", command], check=True)
    new = [path for path in tmp_path.rglob("*.jsonl") if path.name != name]
    assert new
    assert all(load_data(path) == ROWS for path in new)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (
            b"<!DOCTYPE html>\n<html><title>404:\n Not Found</title>",
            'an HTML page ("404: Not Found"), not JSON',
        ),
        (b"<?xml version='1.0'?><Error/>", "XML, not JSON lines; download the file itself"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
            "a pointer of Git LFS, not the",
        ),
        (zipped(["xl/workbook.xml"]), "an Excel workbook, not JSON lines; save its sheet as CSV UTF-8"),
        (b"PK\3\4 and no more", "a zip archive that cannot be read"),
        (b"\x1f\x8b and no more", "gzip that is damaged"),
        (b"%PDF-1.7", "a PDF document, not JSON lines"),
        (b"GGUF\3\0\0\0", "a model's weights (GGUF), not JSON lines"),
        (
            "название,дата,сумма\nа,б,в".encode(),
            "CSV with the columns название, дата, сумма, not JSON",
        ),
        (
            b"messages,id\n\"[{'role': 'user'}\n {'role': 'assistant'}]\",1",
            "CSV with the columns messages, id",
        ),
        ("а\0б".encode(), "contains a NUL character"),
        ("да".encode() + b"\xff", "not UTF-8 text; save the file as UTF-8"),
        ("Привет, как дела?".encode(), "not valid JSON"),
    ],
)
def test_what_no_command_makes_rows_of_is_named_too(data, says, tmp_path):
    (tmp_path / "rows.json").write_bytes(data)
    text = refusal(tmp_path / "rows.json")
    assert text.startswith(says)
    assert "python" not in text


def test_no_command_overwrites_a_file_or_reads_a_pipe_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_bytes(indented(ROWS[0]))
    (tmp_path / "rows.jsonl").write_text("mine")
    assert refusal("rows.json").endswith(" rows.json rows-2.jsonl")
    (tmp_path / "rows\x1b.json").write_bytes(gzip.compress(b""))
    assert refusal("rows\x1b.json").endswith(
        "packed with gzip; save it as a file with a plain name and use that"
    )


@pytest.mark.parametrize(
    "text",
    [
        LINES,
        json.dumps(ROWS, indent=1),
        json.dumps({"messages": ROWS[0]["messages"], "data": ROWS}),
        LINES.replace("\n", "\r\n"),
    ],
)
def test_rows_are_no_other_kind(text, tmp_path):
    (tmp_path / "rows.json").write_text(text, encoding="utf-8")
    assert load_data(tmp_path / "rows.json")[0] == ROWS[0]
