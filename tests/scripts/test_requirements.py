"""What is installed works with the oldest Python that the README names; ruff is the same everywhere."""

import re
from importlib.metadata import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[2]


def test_every_requirement_is_installed_and_made_for_the_oldest_python():
    oldest = re.search(r"Python ≥ (\d+\.\d+)", (ROOT / "README.md").read_text(encoding="utf-8"))[1]
    lines = [line for path in ROOT.glob("requirements*.txt") for line in path.read_text().splitlines()]
    requirements = [Requirement(line) for line in lines if line and not line.startswith(("#", "-r"))]
    assert len(requirements) > 15
    for requirement in requirements:
        installed = metadata(requirement.name)
        assert installed["Version"] in requirement.specifier
        assert f"{oldest}.0" in SpecifierSet(installed["Requires-Python"] or ""), requirement


def test_a_commit_is_checked_by_the_same_ruff_as_in_ci():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    pinned = re.search(r"^ruff==(\S+)$", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE)[1]
    assert re.search(r"astral-sh/ruff-pre-commit\n +rev: v(\S+)", hooks)[1] == pinned
    assert re.findall(r"id: (\S+)", hooks) == ["ruff-check", "ruff-format"]
