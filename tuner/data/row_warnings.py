"""What is legal in rows and wrong all the same: leaks, duplicates, look-alikes, odd calls, imbalance."""

import difflib
import re
import unicodedata
import zlib
from collections import defaultdict

import numpy

from tuner.data import chat_text, tool_call

ROWS_AT_ONCE = 1000  # tokenised together, and only counted after that

# Near-duplicates: the likeness of two prompts is that of their sets of CHUNK letters (Jaccard), guessed from
# BANDS × HASHES minima of random hashes (MinHash, Broder 1997) and then worked out.
ALIKE = 0.8
CHUNK = 4
BANDS, HASHES = 12, 4
SEED = 42  # of the hashes
MINORITY = 1 / 3  # a smaller share of rows with, or without, a call teaches "always", or "never"
SPELT_ALIKE = 0.75  # difflib's ratio of two names: one letter in four may differ
RARE = 10  # a spelling that another one, nearly the same, outnumbers so many times is a slip
LATIN, CYRILLIC = "aceopxykABCEHKMOPTXY", "асеорхукАВСЕНКМОРТХУ"  # which look alike

ODD = re.compile(r"[^\w !-~«»—–…]")  # what may be invisible
TWO_SCRIPTS = re.compile(r"[а-яё]+[a-z][а-яёa-z]*|[a-z]+[а-яё][а-яёa-z]*", re.IGNORECASE)  # in a word


def prompt_of(row):
    """Returns the turns that a row's last answer is asked by, in their plain form."""
    return "\n".join(chat_text.normalize(m["content"]) for m in row["messages"][:-1])


def warnings(rows, probes=(), held_out=()):
    """Returns [(line, kind, text), …], in order, for what is legal in [(line, row), …] and yet wrong.

    probes are prompts, held_out is rows like these; neither may be trained on.
    """
    found = [
        *warn_of_prompts(rows, probes, held_out),
        *(w for line, row in rows for w in warn_of_text(line, row)),
        *warn_of_calls(rows),
        *warn_of_balance(rows),
    ]
    return sorted(found, key=lambda warning: warning[0])


def warn_of_prompts(rows, probes, held_out):
    """Yields warnings of prompts that come twice, nearly twice, or that are to judge the tuned model."""
    first, answers = {}, defaultdict(set)
    judges = {chat_text.normalize(prompt): "a probe of compare.py" for prompt in probes}
    judges |= {prompt_of(row): f"line {line} of the held-out rows" for line, row in held_out}
    for line, row in rows:
        prompt, answer = prompt_of(row), row["messages"][-1]["content"]
        if prompt in judges:
            yield line, "judge", f"the prompt is {judges[prompt]} too, which then proves nothing"
        if prompt not in first:
            first[prompt] = line
        elif answer in answers[prompt]:
            yield line, "duplicate", f"the same row as line {first[prompt]}"
        else:
            yield line, "contradiction", f"the same prompt as line {first[prompt]} with another answer"
        answers[prompt].add(answer)
    lines = list(first.values())
    for one, other, likeness in near_duplicates(list(first)):
        text = f"nearly the prompt of line {lines[one]} ({likeness:.0%} alike)"
        yield lines[other], "near-duplicate", text


def near_duplicates(texts):
    """Yields (i, j, Jaccard index) with i < j for texts that are ALIKE, each j once."""
    chance = numpy.random.default_rng(SEED)
    factors = chance.integers(1, 2**63, BANDS * HASHES, dtype=numpy.uint64) * 2 + 1  # odd: multiply-shift
    buckets, told = {}, set()
    for start in range(0, len(texts), ROWS_AT_ONCE):
        chunks = [chunks_of(text) for text in texts[start : start + ROWS_AT_ONCE]]
        hashes = [zlib.crc32(chunk.encode("utf-8", "surrogatepass")) for set_ in chunks for chunk in set_]
        hashes = numpy.array(hashes, dtype=numpy.uint64)
        begins = numpy.cumsum([0, *map(len, chunks[:-1])])
        minima = [numpy.minimum.reduceat(hashes * factor >> 32, begins) for factor in factors]
        minima = numpy.array(minima, dtype=numpy.uint32).T.reshape(len(chunks), BANDS, HASHES).copy()
        for j, (mine, bands) in enumerate(zip(chunks, minima, strict=True), start):
            for band in range(BANDS):
                i = buckets.setdefault((band, bands[band].tobytes()), j)
                if i != j and j not in told:
                    other = chunks_of(texts[i])
                    likeness = len(other & mine) / len(other | mine)
                    if likeness >= ALIKE:
                        told.add(j)
                        yield i, j, likeness


def chunks_of(text):
    return {text[k : k + CHUNK] for k in range(max(1, len(text) - CHUNK + 1))}


def warn_of_text(line, row):
    """Yields warnings of letters that no one sees, in any turn of a row."""
    for number, message in enumerate(row["messages"], 1):
        text = message["content"]
        if text != text.strip():
            yield line, "blanks", f"turn {number} begins or ends with blanks, which are not learned"
        hidden = {m[0] for m in ODD.finditer(text) if is_invisible(m[0], text[: m.start()])}
        if hidden:
            names = ", ".join(unicodedata.name(c, f"U+{ord(c):04X}") for c in sorted(hidden))
            yield line, "invisible", f"turn {number} holds an invisible character: {names}"
        for word in TWO_SCRIPTS.findall(text):
            if mixed := look_alikes(word):
                yield line, "look-alikes", f'turn {number}: in "{word}" {mixed}'


def is_invisible(character, before):
    """Whether a character shows nothing, or no more than a space does; emoji may be joined by one."""
    if unicodedata.category(character) in ("Zs", "Zl", "Zp"):
        return character != " "
    if character == "\u200d" and before and unicodedata.category(before[-1]) in ("So", "Sk", "Mn"):
        return False
    return unicodedata.category(character) in ("Cf", "Cc", "Co", "Cn") and character not in "\n\t"


def look_alikes(word):
    """Says which letters of a word are of another script and look like its own; None if there are none."""
    latin = [c for c in word if c.isascii()]
    cyrillic = [c for c in word if not c.isascii()]
    few, script = min((latin, "Latin"), (cyrillic, "Cyrillic"), key=lambda pair: len(pair[0]))
    if few and all(c in (LATIN if script == "Latin" else CYRILLIC) for c in few):
        return f"{', '.join(dict.fromkeys(few))} {'are' if len(set(few)) > 1 else 'is'} {script}"
    return None


def warn_of_calls(rows):
    """Yields warnings of calls that are none, have words around them, or are spelt unlike the others."""
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
                yield line, "call", f"turn {number}: the call cannot be read as one ({reason})"
                continue
            if call.deviations:
                yield line, "call", f"turn {number}: the call has {', '.join(call.deviations)}"
            names[call.name].append(line)
            for key in call.arguments:
                keys[key].append(line)
    for what, spellings in (("call's name", names), ("argument", keys)):
        for rare, lines in spellings.items():
            for usual, others in spellings.items():
                if len(lines) * RARE <= len(others) and spelt_alike(rare, usual):
                    text = f'the {what} is "{rare}", and "{usual}" in {len(others)} other places'
                    yield from ((line, "spelling", text) for line in lines)


def spelt_alike(one, other):
    return difflib.SequenceMatcher(None, one.casefold(), other.casefold()).ratio() >= SPELT_ALIKE


def warn_of_balance(rows):
    """Yields a warning where fewer than a third of the rows have a call, or have none."""
    calls = sum(chat_text.has_call(row["messages"]) for _, row in rows)
    if min(calls, len(rows) - calls) < MINORITY * len(rows):
        few, teaches = ("with", "never call") if calls < len(rows) / 2 else ("without", "always call")
        share = f"{min(calls, len(rows) - calls)} of {len(rows)} rows are {few} a call"
        yield 1, "balance", f"{share}, fewer than a third; such rows teach to {teaches}: aim at half and half"
