"""Which tokens of an answer carry a call's name, and which the rest of its calls, as a reader marks them."""

import pytest

from tuner.data import call_tokens

TAG = "<|tool|_|call"
NAMED, BODY = TAG + '| name|="|f|"', '| arguments|="|{}|"/>'
SMILE, EURO, QUOTE = "<0xF0>|<0x9F>|<0x98>|<0x80>", "<0xE2>|<0x82>|<0xAC>", "&|quot|;"
# An answer cut into tokens, as Gemma's are; n for each that carries a name, r for the rest, a dot for words.
CASES = {
    "one call": (NAMED + BODY, "nnnnnnnnrrrr"),
    "a value": (f'{NAMED}| arguments|="{{|{QUOTE}|name|{QUOTE}|:|1|}}|"/>', "nnnnnnnnrrrrrrrrrrrrr"),
    "a quote in the name": (f'{TAG}| name|="|f|{QUOTE}|g|"{BODY}', "nnnnnnnnnnnnrrrr"),
    "words before": (f"Се|ку|нду|.|\n|{NAMED}{BODY}", ".....nnnnnnnnrrrr"),
    "words in the same token": (f".{NAMED}{BODY}|.\n|Да", "nnnnnnnnrrrr.."),
    "a blank in the same token": (f"Да| {NAMED}{BODY}", ".nnnnnnnnrrrr"),
    "two calls": (f"{NAMED}{BODY}|\n|{NAMED}{BODY}", "nnnnnnnnrrrrnnnnnnnnnrrrr"),
    "two calls, words between": (f"{NAMED}{BODY}|\n|и| |{NAMED}{BODY}", "nnnnnnnnrrrr...nnnnnnnnrrrr"),
    "two calls in one token": (f"{NAMED}{BODY}{NAMED}{BODY}", "nnnnnnnnrrrnnnnnnnnrrrr"),
    "a name's quote beside other letters": (f'{TAG}| name|="|f|" arguments|="|{{}}|"/>', "nnnnnnnnrrr"),
    "letters of several bytes": (
        f'ж|{SMILE}|{TAG}| name|="|{EURO}|ы|"| arguments|="{{|{QUOTE}|{EURO}|{QUOTE}|:1|}}"/>',
        ".....nnnnnnnnnnnrrrrrrrrrrrrr",
    ),
    "single quotes": (f"{TAG}| name|='|f|'| arguments|='{{|}}'/|>", "nnnnnnnnrrrr"),
    "arguments first": (
        f"""{TAG}| arguments|='|{{"|x|":| "| name|=f|"|}}'| name|='|f|'/>""",
        "nnnnrrrrrrrrrrnnnn",
    ),
    "a closing tag": (f'{NAMED}| arguments|="|{{}}|"></|tool|_|call|>', "nnnnnnnnrrrrrrrr"),
    "blanks": (f'{TAG}|\n|name| =| "|f|"| arguments|="|{{}}|"| />', "nnnnnnnnnnrrrrr"),
    "no JSON": (f'{NAMED}| arguments|="|{{x}}|"/>|\n|Да', "nnnnnnnnrrrrrr"),
    "no arguments": (f"{NAMED}|/>", "nnnnnnnnr"),
    "a tag that is cut": (f"{NAMED}| argu", "nnnnnnnnr"),
    "a malformed call, then a good one": (f"{NAMED}|/>|\n|{NAMED}{BODY}", "nnnnnnnnrrnnnnnnnnrrrr"),
    "arguments without an end, then a name": (f"""{TAG}| arguments|='|{{| name|="|f|"/>""", "nnnnnnnnnnn"),
    "another form": (f'Да|{TAG}|>|{{"|name|":| "|f|"}}|</|tool|_|call|>', "nnnnnnnnnnnnnnnnn"),
    "no call": ("<|tool|box|>", "nnnn"),
}
UNREAD = ["no JSON", "no arguments", "a tag that is cut", "arguments without an end, then a name"]
UNREAD += ["another form", "no call"]


def find(case):
    text = CASES[case][0].replace(" ", "▁")
    return call_tokens.find(text.split("|"))


@pytest.mark.parametrize("case", CASES)
def test_each_token_of_an_answer_belongs_where_a_reader_puts_it(case):
    marks, found = CASES[case][1], find(case)
    assert found.names == [i for i, mark in enumerate(marks) if mark == "n"]
    assert found.rest == [i for i, mark in enumerate(marks) if mark == "r"]


def test_call_or_text_is_decided_at_the_first_letter_of_the_first_call():
    late = {
        "words before": 5,
        "a blank in the same token": 1,
        "letters of several bytes": 5,
        "another form": 1,
    }
    assert {case: find(case).first for case in CASES} == {case: late.get(case, 0) for case in CASES}


def test_calls_are_read_beside_their_tokens():
    counts = {case: len(find(case).calls) for case in CASES}
    assert [case for case, count in counts.items() if count == 0] == UNREAD
    assert [case for case, count in counts.items() if count == 2] == [c for c in CASES if "two calls" in c]
    [call] = find("a value").calls
    assert (call.name, call.arguments) == ("f", {"name": 1})
