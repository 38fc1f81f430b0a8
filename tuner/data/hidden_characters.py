"""Find the characters of a text that nobody sees, and leave alone those that a script or an emoji needs."""

import re
import unicodedata

import regex  # transformers requires it; it knows the letters and emoji of years after Python's own tables

# Quick, and no more than a sieve: what may be hidden. \w holds Hangul's fillers, which show nothing.
SUSPECT = re.compile(r"[^\w !-~«»—–…\n\t]|[\u115f\u1160\u3164\uffa0]")
_JOINING = (  # the scripts in whose words joiners are written, between letters or after a virama
    "Arab Syrc Mand Nkoo Mong Phag Deva Beng Guru Gujr Orya Taml Telu Knda Mlym Sinh Mymr Khmr Tibt Bali "
    "Java Newa Gran Sidd Tirh Cakm Mtei Lana Rohg Sogd"
)
_UNSPACED = "Thai Laoo Khmr Mymr Lana Talu"  # the scripts whose words a zero width space parts


def _scripts(names):
    return "[" + "".join(rf"\p{{scx={name}}}" for name in names.split()) + "]"


_PICTURE = r"\p{Extended_Pictographic}[\ufe0e\ufe0f]?\p{Emoji_Modifier}?\ufe0f?"
_NEEDED = (
    rf"{_PICTURE}(?:\u200d{_PICTURE})+",  # a family
    r"\U0001f3f4[\U000e0030-\U000e0039\U000e0061-\U000e007a]{3,6}\U000e007f",  # the flag of a region
    r"[0-9#*]\ufe0f\u20e3?",  # a keycap
    r"[\p{S}\p{Extended_Pictographic}--\p{ASCII}][\ufe0e\ufe0f]",  # as text, or as an emoji
    r"[[\p{Sm}\p{Lo}]--\p{ASCII}][\ufe00-\ufe02]|\p{Han}[\U000e0100-\U000e01ef]|\p{Mong}[\u180b-\u180d\u180f]",
    rf"(?<={_scripts(_JOINING)})[\u200c\u200d](?={_scripts(_JOINING)})",
    r"(?<=\p{ccc=Virama})[\u200c\u200d]|(?<=\p{scx=Arab})\u200d",
    rf"(?<={_scripts(_UNSPACED)})\u200b(?={_scripts(_UNSPACED)})",
    r"\p{Prepended_Concatenation_Mark}",  # formats, which show
)
_HIDDEN = (
    r"[\p{Z}\p{Cc}\p{Cf}\p{Co}\p{Cn}\p{Default_Ignorable_Code_Point}\u2800"
    r"--[\ \n\t\p{Extended_Pictographic}]]"
)
_PATTERN = regex.compile(rf"(?V1){'|'.join(_NEEDED)}|({_HIDDEN})")


def find(text):
    """Return [(index, character), …] of what looks like nothing, or like a space without being one."""
    if not SUSPECT.search(text):
        return []
    return [(match.start(), match[1]) for match in _PATTERN.finditer(text) if match[1]]


def names(characters):
    """Return the names of characters, in their order, as one text."""
    return ", ".join(unicodedata.name(c, f"U+{ord(c):04X}") for c in sorted(set(characters)))
