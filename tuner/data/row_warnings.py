"""Warn of what is legal in rows but likely wrong: leaks, duplicates, look-alikes, odd calls, imbalance."""

import re
import zlib
from collections import defaultdict
from typing import NamedTuple

import numpy

from tuner.data import chat_text, hidden_characters, tool_arguments, tool_call
from tuner.system.console import printable

# Near-duplicates: the similarity of two prompts is the Jaccard index of their sets of CHUNK letters; pairs to
# compare are found by BANDS × HASHES minima of random hashes (MinHash, Broder 1997).
MIN_SIMILARITY = 0.8
CHUNK = 4
BANDS, HASHES = 12, 4
SEED = 42  # of the hashes
TEXTS_AT_ONCE = 1000  # hashed together, for their memory
MAX_LENGTH_RATIO = 2  # of texts to compare: a row costs no more than its own length, however many there are
MINORITY = 1 / 3  # a smaller share of rows with, or without, a call teaches "always", or "never"
MISSPELLING_RATIO = 10  # a spelling is a slip if a similar one is this many times as frequent
MIN_LETTERS, MAX_LETTERS = 4, 64  # of names whose spelling is compared; OpenAI takes names of 64
LATIN, CYRILLIC = "aceopxykABCEHKMOPTXY", "асеорхукАВСЕНКМОРТХУ"  # which look alike
# A word of two scripts; looked for at the beginning of a word only, as each try takes the length of the word.
TWO_SCRIPTS = re.compile(r"(?<![а-яёa-z])(?:[а-яё]+[a-z]|[a-z]+[а-яё])[а-яёa-z]*", re.IGNORECASE)
EXCERPT = 60  # letters of a turn before the one that a warning is about


class RowWarning(NamedTuple):
    """What is likely wrong on a line."""

    line: int
    kind: str
    text: str
    about: str | None = None  # the turn that it is about, or the part of it
    row: dict | None = None  # None for all of them; several may stand on one line
    file: str | None = None  # "held_out" or "probes", None for the rows that are trained on


def prompt_of(row):
    """Return the turns before a row's last answer, normalized."""
    return "\n".join(chat_text.normalize(m["content"]) for m in row["messages"][:-1])


def warnings(rows, probes=(), held_out=()):
    """Return [RowWarning, …], by line, for rows that are legal but likely wrong.

    rows: [(line, row), …]; probes, held_out: [(line, conversation), …] that should not be trained on.
    """
    unsorted = [
        *warn_of_leaks(rows, probes, held_out),
        *warn_of_prompts(rows),
        *(w for line, row in rows for w in warn_of_text(line, row)),
        *warn_of_calls(rows),
        *warn_of_balance(rows),
    ]
    return sorted(unsorted, key=lambda warning: warning.line)


def warn_of_leaks(rows, probes, held_out):
    """Yield warnings of prompts, before whichever answer of a row, by which the tuned model is judged."""
    judges = {}
    for _, messages in probes:
        judges[chat_text.fingerprint(messages)] = "a probe of compare.py"
    for line, messages in held_out:
        judges.setdefault(chat_text.fingerprint(messages), f"line {line} of the held-out rows")
    for line, row in rows:
        found = {}  # judge → turn
        for turn, fingerprint in chat_text.trained_prompts(row["messages"]):
            if fingerprint in judges:
                found.setdefault(judges[fingerprint], turn)
        for judge, turn in found.items():
            prompt = "the prompt" if turn == len(row["messages"]) - 1 else f"the prompt in turn {turn}"
            text = f"{prompt} is also {judge}, so its result there says nothing (data leak)"
            yield RowWarning(line, "leak", text, row["messages"][turn - 1]["content"], row)


def warn_of_prompts(rows):
    """Yield warnings of prompts that repeat, or nearly repeat."""
    first, answers = {}, defaultdict(set)  # prompt → (line, turn, row), answers
    for line, row in rows:
        prompt, answer = prompt_of(row), row["messages"][-1]["content"]
        about = next(m["content"] for m in reversed(row["messages"]) if m["role"] == "user")
        if prompt not in first:
            first[prompt] = line, about, row
        elif answer in answers[prompt]:
            yield RowWarning(line, "duplicate", f"duplicate of line {first[prompt][0]}", about, row)
        else:
            text = f"same prompt as line {first[prompt][0]}, but another answer"
            yield RowWarning(line, "contradiction", text, about, row)
        answers[prompt].add(answer)
    prompts = list(first)
    for earlier, later, similarity in near_duplicates(prompts):
        text = f"prompt is {similarity:.0%} similar to line {first[prompts[earlier]][0]}"
        line, about, row = first[prompts[later]]
        yield RowWarning(line, "near-duplicate", text, about, row)


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
                lengths = sorted((len(texts[i]), len(texts[j])))
                if i != j and j not in reported and lengths[1] <= MAX_LENGTH_RATIO * lengths[0]:
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
        text, turn = message["content"], f"turn {number}"
        if text != text.strip() and message["role"] != "tool":
            found = f"{turn} begins or ends with whitespace, which is not trained"
            yield RowWarning(line, "whitespace", found, text, row)
        if hidden := hidden_characters.find(text):
            names = hidden_characters.names(character for _, character in hidden)
            found = f"{turn} contains invisible characters: {names}"
            yield RowWarning(line, "invisible", found, excerpt(text, hidden[0][0]), row)
        words = {match[0]: match.start() for match in TWO_SCRIPTS.finditer(text)}
        for word, position in words.items():
            if mixed := look_alikes(word):
                found = f'{turn}: in "{printable(word)}" {mixed}'
                yield RowWarning(line, "look-alikes", found, excerpt(text, position), row)


def excerpt(text, position):
    """Return the text from a little before a position."""
    start = max(0, position - EXCERPT)
    return "…" * (start > 0) + text[start : position + 4 * EXCERPT]


def look_alikes(word):
    """Return which letters of a word look like those of its script but are of another; None if no one is."""
    latin = [c for c in word if c.isascii()]
    cyrillic = [c for c in word if not c.isascii()]
    few, script = min((latin, "Latin"), (cyrillic, "Cyrillic"), key=lambda pair: len(pair[0]))
    if few and all(c in (LATIN if script == "Latin" else CYRILLIC) for c in few):
        return f"{', '.join(dict.fromkeys(few))} {'are' if len(set(few)) > 1 else 'is'} {script}"
    return None


def warn_of_calls(rows):
    """Yield warnings of calls that are malformed or not canonical, undeclared, or spelled unlike others."""
    names, keys = defaultdict(list), defaultdict(list)  # spelling → [(line, turn, row), …]
    for line, row in rows:
        declared = tool_arguments.schemas_of(row.get("tools"))
        for number, message in enumerate(row["messages"], 1):
            text = message["content"].strip()
            if not chat_text.is_trained(message) or not tool_call.looks_like_call(text):
                continue
            calls, found = calls_of(text)
            for call in calls:
                if call.deviations:
                    found.append(f"non-canonical call: {', '.join(call.deviations)}")
                found += tool_arguments.faults(call.name, call.arguments, declared)
                names[call.name].append((line, text, row))
                for key in call.arguments:
                    keys[key].append((line, text, row))
            yield from (RowWarning(line, "call", f"turn {number}: {fault}", text, row) for fault in found)
    for kind, spellings in (("function name", names), ("argument", keys)):
        counts = {spelling: len(places) for spelling, places in spellings.items()}
        for rare, usual in misspellings(counts).items():
            shown = f'"{printable(rare)}" may be a misspelling of "{printable(usual)}"'
            for line, text, row in spellings[rare]:
                yield RowWarning(line, "spelling", f"{kind} {shown} ({counts[usual]} times)", text, row)


def calls_of(text):
    """Return (calls, [what is malformed]) of an answer: calls on lines of their own, after words or not."""
    parts = tool_call.split_text(text)[0]
    calls = [part for part in parts if not isinstance(part, str)]
    words = [part for part in parts if isinstance(part, str)]
    for part in words:
        if tool_call.looks_like_call(part):
            return calls, [f"malformed call: {tool_call.parse(part)[1]}"]
    before = words.pop(0) if isinstance(parts[0], str) else "\n"
    apart = before.endswith("\n") and not isinstance(parts[-1], str) and not "".join(words).strip()
    return calls, [] if apart else ["malformed call: text around the call"]


def misspellings(counts):
    """Return {rare: usual} of names that differ by one letter, or two, one left out of each.

    counts: name → how often it is there. One letter missing, added, changed or moved is four of five slips of
    the hand (Damerau 1964). Names are compared by their rests: time does not grow with the number of pairs.
    """
    usual = {}  # what is left of a name → the most frequent name
    for name in sorted(counts, key=counts.get, reverse=True):
        if counts[name] < MISSPELLING_RATIO:
            break
        for rest in rests(name):
            usual.setdefault(rest, name)
    found = {}
    for name, count in counts.items():
        similar = [usual[rest] for rest in rests(name) if rest in usual]
        most = max(similar, key=counts.get, default=name)
        if count * MISSPELLING_RATIO <= counts[most] and max(len(name), len(most)) >= MIN_LETTERS:
            found[name] = most
    return found


def rests(name):
    """Yield a name in lower case, without underscores and the like, and the same without each one letter."""
    if len(name) <= MAX_LETTERS:
        letters = re.sub(r"[\W_]", "", name.casefold())
        yield letters
        yield from (letters[:i] + letters[i + 1 :] for i in range(len(letters)) if len(letters) > 2)


def warn_of_balance(rows):
    """Yield a warning if fewer than a third of the rows have a call, or have none."""
    calls = sum(chat_text.has_call(row["messages"]) for _, row in rows)
    if min(calls, len(rows) - calls) < MINORITY * len(rows):
        few, teaches = ("with", "never call") if calls < len(rows) / 2 else ("without", "always call")
        share = f"{min(calls, len(rows) - calls)} of {len(rows)} rows are {few} a call"
        text = f"{share}; this teaches the model to {teaches}; aim for a balanced set"
        yield RowWarning(1, "balance", text)
