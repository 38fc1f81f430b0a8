"""Which characters of a text are hidden, and which its script or its emoji need."""

import pytest

from tuner.data import hidden_characters

TAGS = {text: "".join(chr(0xE0000 + ord(c)) for c in text) for text in ("gbeng", "ustx", "gb", "a")}
END = "\U000e007f"


@pytest.mark.parametrize(
    "text",
    [
        f"Флаг 🏴{TAGS['gbeng']}{END} и 🏴{TAGS['ustx']}{END}",
        "1\ufe0f\u20e3 #\ufe0f\u20e3 ❤\ufe0f ☺\ufe0e ™\ufe0f ↔\ufe0f ℹ\ufe0f ⁉\ufe0f",
        "👨\u200d👩\u200d👧 👩🏽\u200d🚀 🏳\ufe0f\u200d🌈 ❤\ufe0f\u200d🔥 🏴\u200d☠\ufe0f 🫱🏻\u200d🫲🏿",
        "می\u200cخواهم کتاب\u200cها ه\u200d",  # Persian
        "क\u094d\u200dष क\u094d\u200cष श्रीमान\u094d\u200c",  # Hindi
        "র\u200d্য ක්\u200dර അവന\u0d4d\u200d",  # Bengali, Sinhala, Malayalam
        "ខ្ញុំ\u200bស្រឡាញ់ สวัสดี\u200bครับ",  # Khmer, Thai
        "葛\U000e0100 ∩\ufe00 ᠠ\u180b ו\u05b8 \u0600١",
        "🫩 🫆 \U0001fac8 \U0001ccfa \U00016ea0 \U00010d4a",  # of Unicode 16 and 17; Python 3.11 has 14
        "5 ₽ № § … «да» – „нет“ → ≈ é a\u0301 й\n\tкод",
    ],
)  # fmt: skip
def test_what_a_script_or_an_emoji_needs_is_not_hidden(text):
    assert hidden_characters.find(text) == []


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("сло\u200bво", "ZERO WIDTH SPACE"),
        ("сло\u200cво", "ZERO WIDTH NON-JOINER"),
        ("wo\u200drd", "ZERO WIDTH JOINER"),
        ("🙂\u200d да", "ZERO WIDTH JOINER"),
        ("می\u200c\u200cخواهم", "ZERO WIDTH NON-JOINER"),
        ("می\u200bخواهم", "ZERO WIDTH SPACE"),
        ("а\ufeffб", "ZERO WIDTH NO-BREAK SPACE"),
        ("сл\u00adово", "SOFT HYPHEN"),
        ("\u202eтекст\u2066", "RIGHT-TO-LEFT OVERRIDE, LEFT-TO-RIGHT ISOLATE"),
        ("да\U000e0041\U000e0042", "TAG LATIN CAPITAL LETTER A, TAG LATIN CAPITAL LETTER B"),
        (f"🙂{TAGS['gb']}{END}", "TAG LATIN SMALL LETTER B, TAG LATIN SMALL LETTER G, CANCEL TAG"),
        (f"🏴{TAGS['a'] * 9}{END}", "TAG LATIN SMALL LETTER A, CANCEL TAG"),  # no flag is as long
        ("😀\U000e0101\U000e0102", "VARIATION SELECTOR-18, VARIATION SELECTOR-19"),
        ("а\ufe0f", "VARIATION SELECTOR-16"),
        ("5\u00a0000\u202f₽", "NO-BREAK SPACE, NARROW NO-BREAK SPACE"),
        ("а\u2028б\r", "U+000D, LINE SEPARATOR"),
        ("\ue000 \U000f0000", "U+E000, U+F0000"),
        ("а\u0378\ufdd0", "U+0378, U+FDD0"),
        ("ㅤ\u2800\u034f", "COMBINING GRAPHEME JOINER, BRAILLE PATTERN BLANK, HANGUL FILLER"),
    ],
)  # fmt: skip
def test_what_nobody_sees_is_hidden(text, hidden):
    assert hidden_characters.names(c for _, c in hidden_characters.find(text)) == hidden
    assert all(text[index] == character for index, character in hidden_characters.find(text))
