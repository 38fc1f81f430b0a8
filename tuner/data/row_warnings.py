"""Warn of what is legal in rows but likely wrong: leaks, duplicates, look-alikes, odd calls, imbalance."""

import difflib
import re
import unicodedata
import zlib
from collections import defaultdict

import numpy

from tuner.data import chat_text, tool_call

# Near-duplicates: the similarity of two prompts is the Jaccard index of their sets of CHUNK letters; pairs to
# compare are found by BANDS × HASHES minima of random hashes (MinHash, Broder 1997).
MIN_SIMILARITY = 0.8
CHUNK = 4
BANDS, HASHES = 12, 4
SEED = 42  # of the hashes
TEXTS_AT_ONCE = 1000  # hashed together, for their memory
MINORITY = 1 / 3  # a smaller share of rows with, or without, a call teaches "always", or "never"
SIMILAR_SPELLING = 0.75  # difflib's ratio of two names: one letter in four may differ
MISSPELLING_RATIO = 10  # a spelling is a slip if a similar one is this many times as frequent
LATIN, CYRILLIC = "aceopxykABCEHKMOPTXY", "асеорхукАВСЕНКМОРТХУ"  # which look alike
ODD = re.compile(r"[^\w !-~«»—–…]")  # what may be invisible
TWO_SCRIPTS = re.compile(r"[а-яё]+[a-z][а-яёa-z]*|[a-z]+[а-яё][а-яёa-z]*", re.IGNORECASE)  # in a word


def prompt_of(row):
    """Return the turns before a row's last answer, normalized."""
    return "\n".join(chat_text.normalize(m["content"]) for m in row["messages"][:-1])


def warnings(rows, probes=(), held_out=()):
    """Return [(line, kind, text), …], by line, for rows that are legal but likely wrong.

    rows, held_out: [(line, row), …]; probes: prompts. Neither probes nor held_out should be trained on.
    """
    unsorted = [
        *warn_of_prompts(rows, probes, held_out),
        *(w for line, row in rows for w in warn_of_text(line, row)),
        *warn_of_calls(rows),
        *warn_of_balance(rows),
    ]
    return sorted(unsorted, key=lambda warning: warning[0])


def warn_of_prompts(rows, probes, held_out):
    """Yield warnings of prompts that repeat, nearly repeat, or are used to judge the tuned model."""
    first, answers = {}, defaultdict(set)
    judges = {chat_text.normalize(prompt): "a probe of compare.py" for prompt in probes}
    judges |= {prompt_of(row): f"line {line} of the held-out rows" for line, row in held_out}
    for line, row in rows:
        prompt, answer = prompt_of(row), row["messages"][-1]["content"]
        if prompt in judges:
            text = f"the prompt is also {judges[prompt]}, so its result there says nothing (data leak)"
            yield line, "leak", text
        if prompt not in first:
            first[prompt] = line
        elif answer in answers[prompt]:
            yield line, "duplicate", f"duplicate of line {first[prompt]}"
        else:
            yield line, "contradiction", f"same prompt as line {first[prompt]}, but another answer"
        answers[prompt].add(answer)
    lines = list(first.values())
    for earlier, later, similarity in near_duplicates(list(first)):
        text = f"prompt is {similarity:.0%} similar to line {lines[earlier]}"
        yield lines[later], "near-duplicate", text


def near_duplicates(texts):
    """Yield (i, j, Jaccard index), i < j, for texts of MIN_SIMILARITY or more, each j once."""
    generator = numpy.random.default_rng(SEED)
    factors = generator.integers(1, 2**63, BANDS * HASHES, dtype=numpy.uint64) * 2 + 1  # odd: multiply-shift
    buckets, reported = {}, set()
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        chunks = [chunks_of(text) for text in texts[start : start + TEXTS_AT_ONCE]]
        hashes = [zlib.crc32(chunk.encode("utf-8", "surrogatepass")) for set_ in chunks for chunk in set_]
        hashes = numpy.array(hashes, dtype=numpy.uint64)
        begins = numpy.cumsum([0, *map(len, chunks[:-1])])
        minima = [numpy.minimum.reduceat(hashes * factor >> 32, begins) for factor in factors]
        minima = numpy.array(minima, dtype=numpy.uint32).T.reshape(len(chunks), BANDS, HASHES).copy()
        for j, (mine, bands) in enumerate(zip(chunks, minima, strict=True), start):
            for band in range(BANDS):
                i = buckets.setdefault((band, bands[band].tobytes()), j)
                if i != j and j not in reported:
                    other = chunks_of(texts[i])
                    similarity = len(other & mine) / len(other | mine)
                    if similarity >= MIN_SIMILARITY:
                        reported.add(j)
                        yield i, j, similarity


def chunks_of(text):
    """Return the set of all CHUNK adjacent letters of a text."""
    return {text[k : k + CHUNK] for k in range(max(1, len(text) - CHUNK + 1))}


def warn_of_text(line, row):
    """Yield warnings of what cannot be seen in the turns of a row."""
    for number, message in enumerate(row["messages"], 1):
        text = message["content"]
        if text != text.strip():
            yield line, "whitespace", f"turn {number} begins or ends with whitespace, which is not trained"
        hidden = {m[0] for m in ODD.finditer(text) if is_invisible(m[0], text[: m.start()])}
        if hidden:
            names = ", ".join(unicodedata.name(c, f"U+{ord(c):04X}") for c in sorted(hidden))
            yield line, "invisible", f"turn {number} contains invisible characters: {names}"
        for word in TWO_SCRIPTS.findall(text):
            if mixed := look_alikes(word):
                yield line, "look-alikes", f'turn {number}: in "{word}" {mixed}'


def is_invisible(character, before):
    """Return whether a character looks like nothing or like a space; a joiner within emoji does not count."""
    if unicodedata.category(character) in ("Zs", "Zl", "Zp"):
        return character != " "
    if character == "\u200d" and before and unicodedata.category(before[-1]) in ("So", "Sk", "Mn"):
        return False
    return unicodedata.category(character) in ("Cf", "Cc", "Co", "Cn") and character not in "\n\t"


def look_alikes(word):
    """Return which letters of a word look like those of its script but are of another; None if no one is."""
    latin = [c for c in word if c.isascii()]
    cyrillic = [c for c in word if not c.isascii()]
    few, script = min((latin, "Latin"), (cyrillic, "Cyrillic"), key=lambda pair: len(pair[0]))
    if few and all(c in (LATIN if script == "Latin" else CYRILLIC) for c in few):
        return f"{', '.join(dict.fromkeys(few))} {'are' if len(set(few)) > 1 else 'is'} {script}"
    return None


def warn_of_calls(rows):
    """Yield warnings of calls that are malformed or not canonical, or spelled unlike the others."""
    names, keys = defaultdict(list), defaultdict(list)
    for line, row in rows:
        for number, message in enumerate(row["messages"], 1):
            if message["role"] != "assistant":
                continue
            text = message["content"].strip()
            if not tool_call.looks_like_call(text):
                continue
            call, reason = tool_call.parse(text)
            if call is None:
                yield line, "call", f"turn {number}: malformed call: {reason}"
                continue
            if call.deviations:
                yield line, "call", f"turn {number}: non-canonical call: {', '.join(call.deviations)}"
            names[call.name].append(line)
            for key in call.arguments:
                keys[key].append(line)
    for kind, spellings in (("function name", names), ("argument", keys)):
        for rare, lines in spellings.items():
            for usual, others in spellings.items():
                if len(lines) * MISSPELLING_RATIO <= len(others) and is_similar(rare, usual):
                    text = f'{kind} "{rare}" may be a misspelling of "{usual}" ({len(others)} times)'
                    yield from ((line, "spelling", text) for line in lines)


def is_similar(name, other):
    ratio = difflib.SequenceMatcher(None, name.casefold(), other.casefold()).ratio()
    return ratio >= SIMILAR_SPELLING


def warn_of_balance(rows):
    """Yield a warning if fewer than a third of the rows have a call, or have none."""
    calls = sum(chat_text.has_call(row["messages"]) for _, row in rows)
    if min(calls, len(rows) - calls) < MINORITY * len(rows):
        few, teaches = ("with", "never call") if calls < len(rows) / 2 else ("without", "always call")
        share = f"{min(calls, len(rows) - calls)} of {len(rows)} rows are {few} a call"
        yield 1, "balance", f"{share}; this teaches the model to {teaches}; aim for a balanced set"
