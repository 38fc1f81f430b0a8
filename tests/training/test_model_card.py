"""The merged model's README: figures of the run, and of a stranger's files nothing but text."""

import json

import pytest
import yaml

from tuner.training import model_card

HOSTILE = "</code>`x` <script>alert(1)</script>\n---\nlicense: mit\n# [a](javascript:b) ![](https://c)\x1b[2J"
RUN = {
    "rows": {"all": 70},
    "data_sha256": "ab" * 32,
    "bits": 4,
    "steps": 40,
    "settings": {"lora_r": 16, "data": "/home/anna/rows.json", "model": "/home/anna/base", "output": "out"},
    "versions": {"torch": "2.13.0"},
    "tools": ["get_balance", "get_rate"],
}
TUNED = {
    "decision": {"false_call_rate": {"part": 0, "whole": 20, "value": 0.0}},
    "right": {"recall": {"part": 19, "whole": 20, "value": 0.95}, "f1": {"part": 38, "value": 38 / 39}},
}
OLDER = {"right": 19, "needed": 20, "false": 0, "general": 20, "f1": 0.97}  # before there were four steps
COMPARISON = {"bits": None, "passed": 5, "probes": [{}] * 6, "rows": {"tuned": TUNED}}
NAME = "google/gemma-3-4b-it"


def card_of(name=NAME, revision="0123", run=RUN, comparison=COMPARISON):
    return model_card.model_card(name, revision, run, comparison)


def front_matter(card):
    start, matter, _ = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(matter)


def replaced(value, path, by):
    """Return a copy of nested dicts with one value replaced."""
    if not path:
        return by
    return {**value, path[0]: replaced(value[path[0]], path[1:], by)}


def paths(value, path=()):
    if isinstance(value, dict):
        for key in value:
            yield (*path, key)
            yield from paths(value[key], (*path, key))


def test_the_base_is_a_name_on_the_hub_or_nothing():
    matter = {"base_model": NAME, "license": "gemma", "library_name": "transformers"}
    assert front_matter(card_of()) == matter
    del matter["base_model"]
    card = card_of(name=None)
    assert front_matter(card) == matter
    assert "Modified from a Gemma 3 model (revision `0123`)" in card
    assert "anna" not in card


def test_the_run_and_the_verdict_are_described():
    lines = card_of().splitlines()[-7:]
    assert lines == [
        "- calls: `get_balance`, `get_rate`",
        "- settings: `lora_r 16`",
        "- versions: `torch 2.13.0`",
        f"- rows: 70, sha256 of the file `{'ab' * 32}`",
        "- trained: in 4 bits, 40 steps",
        "- probes passed, base unquantized: 5 of 6",
        "- held-out rows, base unquantized: 19 of 20 calls right, 0 of 20 false calls, F1 0.97",
    ]


def test_what_is_not_known_of_the_verdict_is_left_out():
    older = {**COMPARISON, "rows": {"tuned": OLDER}}
    assert card_of(comparison=older) == card_of(comparison={})
    no_rows = {"right": {"recall": {"part": 0, "whole": 0}, "f1": {"value": None}}}
    no_rows["decision"] = {"false_call_rate": {"part": 0, "whole": 0, "value": None}}
    lines = card_of(comparison={**COMPARISON, "rows": {"tuned": no_rows}}).splitlines()
    assert lines[-1] == "- probes passed, base unquantized: 5 of 6"


@pytest.mark.parametrize(
    ("tools", "title", "calls"),
    [
        ([], "tuned with QLoRA", []),
        (None, "tuned with QLoRA", []),
        (["get `x`"], "tuned with QLoRA to call `get 'x'`", ["- calls: `get 'x'`"]),
        (["f"] * 23, "tuned with QLoRA to call 23 tools", [f"- calls: {'`f`, ' * 20}and 3 more"]),
    ],
)
def test_the_title_says_what_was_trained_to_be_called(tools, title, calls):
    lines = card_of(run={**RUN, "tools": tools}).splitlines()
    assert f"# {NAME}, {title}" in lines
    assert [line for line in lines if line.startswith("- calls")] == calls


def plain(card):
    """Return a card without its code spans: what Markdown may read as anything but text."""
    pieces = card.split("`")
    assert len(pieces) % 2 == 1
    return "".join(pieces[::2])


@pytest.mark.parametrize("by", [HOSTILE, [HOSTILE], {HOSTILE: HOSTILE}, None, -1e400, True, {}], ids=ascii)
@pytest.mark.parametrize(
    ("name", "record"), [("run", RUN), ("comparison", COMPARISON), ("run", {}), ("comparison", [])]
)
def test_whatever_a_strangers_files_say_is_text(name, record, by):
    expected = front_matter(card_of())
    for path in [(), *paths(record)]:
        card = card_of(**{name: replaced(record, path, by)})
        assert front_matter(card) == expected
        assert card.splitlines().count("---") == 2
        for harmful in ("<", "script>", "](", "\x1b", "license: mit"):
            assert harmful not in plain(card)
        assert "<" not in card
        assert "\x1b" not in card


def test_a_revision_is_text_too():
    card = card_of(revision=HOSTILE)
    assert "<" not in card
    assert front_matter(card) == front_matter(card_of())


def test_settings_that_are_keys_are_text_too():
    run = json.loads(json.dumps({**RUN, "settings": {HOSTILE: 1}, "versions": {HOSTILE: HOSTILE}}))
    assert "<" not in card_of(run=run)
    assert "javascript" not in plain(card_of(run=run))
