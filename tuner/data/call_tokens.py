"""Which tokens of an answer its calls are made of: those that carry a name, and all others of them."""

import re
from typing import NamedTuple

from tuner.data import tool_call

BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a token that is one byte of a letter
WORDS, CALL, NAME = range(3)  # what a byte of an answer belongs to


class CallTokens(NamedTuple):
    """The calls of an answer, and the positions of their tokens, the answer's first one being 0."""

    calls: list  # of tool_call.Call, names and texts in them byte by byte; malformed ones are left out
    first: int  # the first token of the first call, malformed or not
    names: list  # tokens with any letter from a tag's start to its name's closing quote
    rest: list  # all other tokens of the calls


def find(tokens):
    """Return the CallTokens of an answer, [token, …] as convert_ids_to_tokens gives them.

    Blanks before another call are part of it: who says them goes on. A malformed call lasts until the next
    one; where its name cannot be read, or no tag is found, the whole answer counts as a name.
    """
    pieces = [token_bytes(token) for token in tokens]
    text = b"".join(pieces).decode("latin-1")  # a letter a byte: a call's grammar is ASCII
    calls, tags, names = read_calls(text)
    marks = bytearray(len(text))
    for spans, mark in ((tags, CALL), (names, NAME)):
        for start, end in set(spans):
            marks[start:end] = bytes([mark]) * (end - start)
    found, first, at = {WORDS: [], CALL: [], NAME: []}, 0, 0
    for number, piece in enumerate(pieces):
        found[max(marks[at : at + len(piece)], default=WORDS)].append(number)
        if tags and at <= tags[0][0]:
            first = number
        at += len(piece)
    return CallTokens(calls, first, found[NAME], found[CALL])


def read_calls(text):
    """Return (calls, tags, names): the calls read, and [(start, end), …] of all tags and of their names."""
    calls, tags, names, at = [], [], [], 0
    while opening := tool_call.OPENING.search(text, at):
        start, before = opening.start(), at
        call, at, _ = tool_call.parse_at(text, start)
        if call:
            calls.append(call)
        else:
            following = tool_call.OPENING.search(text, opening.end())
            at = following.start() if following else len(text)
        goes_on = tags and not text[before:start].strip(tool_call.BLANK)
        name = tool_call.name_span(text, start) or (0, len(text))
        names += [(before if goes_on else start, opening.end()), name]
        tags.append((start, at))
    return calls, tags, names if tags else [(0, len(text))]


def token_bytes(token):
    """Return what a token stands for in UTF-8."""
    byte = BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
