"""What README.md and docs/ say: commands have these flags, links lead somewhere, messages are the code's."""

import ast
import re
from functools import cache

import pytest

from tests.support.docs import PAGES, ROOT, commands, flags_of

RUN = "pip install -r requirements-rehearsal.txt && python train_qlora.py --rehearse"
TEST = "pip install -r requirements-dev.txt && pytest"
flags_of = cache(flags_of)


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_readme_is_short_and_has_the_two_commands():
    readme = read("README.md")
    assert len(readme.splitlines()) <= 170
    assert len(readme.split()) < 1800
    for command in (RUN, TEST):
        assert f"```sh\n{command}\n```" in readme
    assert f"pip install -q {TEST.removeprefix('pip install ')}" in read(".ci/run")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_a_scripts_with_flags_that_it_has(page):
    shown = commands(page)
    assert shown or page.name == "resuming.md", "no command found"
    for script, flags in shown:
        assert (ROOT / script).is_file(), script
        assert set(flags) <= flags_of(script), script


def slug(heading):
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        path = page.parent / path if path else page
        assert path.is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), target


def test_every_picture_is_shown():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for picture in (ROOT / "docs/pictures").iterdir():
        assert f"pictures/{picture.name})" in text


def test_every_path_named_exists():
    for page in PAGES:
        for path in re.findall(r"\b(?:tuner|tests|benchmarks|runs|docs)/[\w/.-]*\w", page.read_text("utf-8")):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


def texts_of_the_code():
    """Return all texts in the code, adjacent ones joined, with … where a value is put in."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tuner/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def pattern(text):
    return re.compile(".*".join(map(re.escape, text.split("…"))), re.DOTALL)


def test_the_messages_of_the_troubleshooting_page_are_printed_by_the_code():
    shown = re.findall(r"^\| `(.*?)` \|", read("docs/troubleshooting.md"), re.MULTILINE)
    assert len(shown) > 10
    texts = [text for text in texts_of_the_code() if len(text.replace("…", "")) > 10]
    missing = []
    for message in shown:
        if message == "examples.json:17: …":  # whatever is wrong in that row
            continue
        shown_part = pattern(message)  # of a longer text, or all of one with values put in
        if not any(shown_part.search(text) or pattern(text).fullmatch(message) for text in texts):
            missing.append(message)
    assert not missing


def test_the_readme_quotes_the_median_and_the_worst_of_the_results():
    quoted = re.findall(
        r"(0\.\d+), worst (0\.\d+) \| (\d+) of (\d+), worst (\d+) \|$", read("README.md"), re.MULTILINE
    )
    begin, end = (f"<!-- benchmark verdict 4 bits: {word} -->" for word in ("begin", "end"))
    section = read("docs/results.md").partition(begin)[2].partition(end)[0]
    row = r"^\| (?:held-out|plain|hard) \| (\S+) \((\S+)–\S+\) \| (\d+) \(\d+–(\d+)\) of (\d+) "
    measured = re.findall(row, section, re.MULTILINE)
    assert len(quoted) == 3
    assert quoted == [(median, worst, false, of, most) for median, worst, false, most, of in measured]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_words_are_plain_american_english(page):
    stilted = r"\b(?:mend|anew|afresh|so many)\b"
    british = r"\b(?:licence|colour|behaviour|\w*(?:quanti|tokeni|normali)s(?:e|ed|ing|ation))\b"
    assert not re.findall(f"{stilted}|{british}", page.read_text(encoding="utf-8"))
