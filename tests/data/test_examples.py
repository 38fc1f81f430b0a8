"""The shipped rows: half and half, well-formed, and no set holds what another one holds."""

import re
import unicodedata
from pathlib import Path

import pytest

from tuner.data import chat_rows, chat_text, row_warnings

CALL = '<tool_call name="get_sensitive_data" arguments="{}"/>'


def prompts(path):
    """Return all questions of a file, those of earlier turns too."""
    messages = [message for _, row in chat_rows.read_rows(path) for message in row["messages"]]
    return [message["content"] for message in messages if message["role"] == "user"]


@pytest.mark.parametrize(("path", "each"), [("examples.json", 100), ("heldout.json", 40)])
def test_half_calls_and_half_general(path, each):
    rows = [row["messages"] for _, row in chat_rows.read_rows(path)]
    assert [messages[-1]["content"] == CALL for messages in rows].count(True) == each == len(rows) / 2
    answers = [messages[at]["content"] for messages in rows for at in range(1, len(messages), 2)]
    general = [answer for answer in answers if answer != CALL]
    assert not any("tool_call" in answer or "<" in answer for answer in general)
    assert all(answer == answer.strip() and answer[-1] in ".!?»" for answer in general)


def test_no_prompt_stands_twice_in_or_across_the_sets():
    everything = [*prompts("examples.json"), *prompts("heldout.json"), *prompts("probes.json")]
    assert len({chat_text.normalize(prompt) for prompt in everything}) == len(everything) == 346


@pytest.mark.parametrize("path", ["examples.json", "heldout.json", "probes.json"])
def test_no_word_mixes_scripts_and_no_character_is_invisible(path):
    for _, row in chat_rows.read_rows(path):
        for message in row["messages"]:
            text = message["content"]
            assert all(c.isprintable() for c in text), text
            for word in re.findall(r"\w+", text):
                scripts = {unicodedata.name(c).split()[0] for c in word if c.isalpha()}
                assert len(scripts) <= 1, f"{word} in {text}"


@pytest.mark.parametrize("name", ["plain", "hard"])
def test_the_rows_of_the_last_measurement_are_half_calls_and_like_no_others(name):
    rows = chat_rows.read_rows(f"benchmarks/rows/{name}.jsonl")
    answers = [row["messages"][-1]["content"] for _, row in rows]
    assert (len(answers), answers.count(CALL)) == (40, 20)
    assert not any("tool_call" in answer for answer in answers if answer != CALL)
    others = [*prompts("examples.json"), *prompts("heldout.json"), *prompts("probes.json")]
    texts = list(map(chat_text.normalize, others + [row["messages"][0]["content"] for _, row in rows]))
    assert len(set(texts)) == len(texts)
    assert [pair for pair in row_warnings.near_duplicates(texts) if pair[1] >= len(others)] == []


def test_the_rows_that_the_docs_show_are_read_as_they_say(tmp_path):
    page = Path("docs/rows.md").read_text(encoding="utf-8")
    shown = re.findall(r'^({"messages".*})$', page, re.MULTILINE)
    path = tmp_path / "rows.json"
    path.write_text("\n".join(shown), encoding="utf-8")
    (_, text), (_, shaped) = chat_rows.read_rows(path)
    assert [text["messages"], text["messages"][1]["content"]] == [shaped["messages"][:2], CALL]
    result = {"role": "tool", "name": "get_sensitive_data", "content": "5 < 7"}
    assert shaped["messages"][2] == result
    assert '<tool_result name="get_sensitive_data">5 &lt; 7</tool_result>' in page
    readme = Path("README.md").read_text(encoding="utf-8")
    assert re.findall(r'^({"messages".*})$', readme, re.MULTILINE) == shown[:1]
