"""Files a user could bring by mistake or in malice: each gives its known errors, and no bytes a traceback."""

import dataclasses
import json
import random
import re
import sys
from pathlib import Path

import pytest

import check
from tests.support.rows import GOOD, plain
from train_qlora import RECIPE, load_data
from tuner.system.errors import UserError

FOLDER = Path(__file__).with_name("bad_rows")
FILES = sorted(path for path in FOLDER.iterdir() if path.name != "messages.json")
MESSAGES = json.loads((FOLDER / "messages.json").read_text(encoding="utf-8"))
ROWS = GOOD + load_data(Path(__file__).parents[2] / "examples.json")[:10]
TOKENS = [
    *(c.encode() for c in "\"'{}[]:,\\/\n\r\t\0\x0b\x1b\u00a0\u2028\u202e\ufeff“"),
    *(b"\\u", b"\\ud83d", b"\\u0000", b"\\u001b[2J", b"\xff\xfe", b"\xd0", b"NaN", b"-Infinity", b"1e999"),
    *(b"9" * 4301, b"[" * 1100, b'{"a":' * 1100, b"<bos>", b'"messages"', b'"role": "user",', b"//"),
]
VALUES = [None, True, 0, -1.5, 1e300, "", " ", "user", "model", "Да", "<eos>", "\ud83d", "\x1b[2J", [], {}]
VALUES += ["tool", "a", "b", "{}", '{"a": "\\ud83d"}']
KEYS = ["messages", "role", "content", "type", "text", "id", "\x1b[2J\n\u202e", "\udfff", "", "к" * 99]
KEYS += ["tools", "tool_calls", "tool_call_id", "function", "name", "arguments"]


def bent(value, chance):
    """Return a JSON value with keys dropped and renamed, values replaced, repeated, reordered and nested."""
    if chance.random() < 0.03:
        return chance.choice([chance.choice(VALUES), [value], {chance.choice(KEYS): value}])
    if isinstance(value, dict):
        kept = [(key, item) for key, item in value.items() if chance.random() > 0.02]
        return {chance.choice([key] * 500 + KEYS): bent(item, chance) for key, item in kept}
    if isinstance(value, list):
        kept = [bent(item, chance) for item in value if chance.random() > 0.02]
        return chance.choice([kept] * 20 + [kept + kept[:1], kept[::-1]])
    return value


def written(rows, chance):
    """Return rows as the bytes of a file, in one of the layouts that a user's tools write."""
    style = {"ensure_ascii": chance.random() < 0.5}
    array = json.dumps(rows, **style, indent=chance.choice([None, 0, 1]))
    lines = chance.choice(["\n", "\r\n", "\n\n", ",\n"]).join(json.dumps(row, **style) for row in rows)
    return chance.choice([array, lines]).encode("utf-8", "surrogatepass")


def damaged(data, others, chance):
    """Return data with one bit flipped, one slice deleted, repeated or moved, or something put in."""
    a, b, c = sorted(chance.randrange(len(data) + 1) for _ in range(3))
    flipped = bytes(byte ^ 1 << chance.randrange(8) for byte in data[a : a + 1])
    at = chance.choice([0, a, len(data)])
    put_in = [data[:at] + chance.choice(extras) + data[at:] for extras in (TOKENS, others)]
    cut = [data[:a] + data[b:], data[:b] + data[a:], data[:a] + data[b:c] + data[a:b] + data[c:]]
    return chance.choice([*put_in, *cut, data[:a] + flipped + data[a + 1 :]])


def mutations(seed, count):
    """Yield `count` files: good rows bent, good and bad files damaged up to three times, or both."""
    chance = random.Random(seed)
    bad = [path.read_bytes() for path in FILES]
    for _ in range(count):
        rows = chance.sample(ROWS, chance.randint(1, 4))
        good = written(chance.choice([rows, [bent(row, chance) for row in rows]]), chance)
        data = good if chance.random() < 0.8 else chance.choice(bad)
        for _ in range(chance.randint(0, 3)):
            data = damaged(data, [good, *bad], chance)
        yield data


def loaded(path, data):
    path.unlink(missing_ok=True)  # ext4 waits for the disk when a file is written over
    path.write_bytes(data)
    return load_data(path)


def is_accepted(path, data):
    """Assert that data is loaded as the rows that Python's json reads, or is refused in proper messages."""
    try:
        rows = loaded(path, data)
    except UserError as error:
        shown, total = str(error).split("\n"), len(error.faults)
        if total > 20:
            assert shown.pop() == f"… and {total - 20} more"
        numbers = re.findall(rf"^{re.escape(str(path))}:(\d+): .", str(error), re.MULTILINE)
        assert len(numbers) == len(shown) == sum(map(str.isprintable, shown)), shown
        assert all(1 <= int(number) <= data.count(b"\n") + 1 for number in numbers), shown
        return False
    text = data.decode("utf-8-sig").strip(" \t\r\n")
    array = text if text[0] == "[" else "[" + re.sub(r"\n[ \t\r\n]*", ",", text) + "]"
    assert rows == [plain(row) for row in json.loads(array)]
    if not any(message["role"] == "tool" for row in rows for message in row["messages"]):
        assert rows == loaded(path, json.dumps(rows).encode()), "a row of text is read as it stands"
    return True


def test_every_bad_file_has_its_messages_and_none_is_missing():
    assert [path.name for path in FILES] == sorted(MESSAGES)
    assert len(FILES) >= 40


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_bad_file_gives_exactly_its_messages(path):
    with pytest.raises(UserError) as caught:
        load_data(path)
    messages = [line.removeprefix(f"{path}:") for line in str(caught.value).split("\n")]
    messages = [re.sub(r"(?<=; convert it to )\S+(.*: python -c ).*", r"FILE\1…", line) for line in messages]
    assert all(re.match(r"\d+: ", line) and line.isprintable() for line in messages)
    # Pythons after 3.11 word a trailing comma in another way, and nest deeper before they give up.
    if sys.version_info < (3, 12) or not path.stem.startswith(("json_trailing_comma_in", "json_nested")):
        assert messages == MESSAGES[path.name]


@pytest.mark.parametrize("seed", range(4))
def test_ten_thousand_mutated_files_give_legal_rows_or_printable_errors(
    tmp_path, tokenizer, monkeypatch, capsys, seed
):
    """Accepted ones go through the whole of check.py, which must not stumble over what is legal."""
    monkeypatch.setattr(check, "find_tokenizer", lambda model, online: (tokenizer, "here"))
    monkeypatch.setattr(check, "check_access", lambda model, offline: [])
    recipe = dataclasses.replace(RECIPE, max_tokens=10**6)  # which only the tokenizer can count
    monkeypatch.setattr(check, "RECIPE", recipe)
    arguments = ["--data", "rows.json", "--rows", "all", "--html", "page.html"]
    monkeypatch.setattr(sys, "argv", ["check.py", *arguments])
    monkeypatch.chdir(tmp_path)
    accepted = 0
    for number, data in enumerate(mutations(seed, count=2_500)):
        try:
            if is_accepted(tmp_path / "rows.json", data):
                accepted += 1
                assert check.main() == 0
                shown = capsys.readouterr().out
                assert all(line.isprintable() for line in shown.split("\n")), shown
        except Exception as error:
            pytest.fail(f"mutation {number}: {error!r}\n{data[:500]!r}")
    assert 250 < accepted < 2250, "the fuzz proves something only if both ways are walked"
