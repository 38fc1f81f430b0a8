"""What is to be installed can be, by the oldest Python that the README names."""

import re
from importlib.metadata import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[2]


def test_every_requirement_is_there_for_the_oldest_python():
    oldest = re.search(r"Python ≥ (\d+\.\d+)", (ROOT / "README.md").read_text(encoding="utf-8"))[1]
    lines = [line for path in ROOT.glob("requirements*.txt") for line in path.read_text().splitlines()]
    wanted = [Requirement(line) for line in lines if line and not line.startswith(("#", "-r"))]
    assert len(wanted) > 15
    for requirement in wanted:
        found = metadata(requirement.name)
        assert found["Version"] in requirement.specifier
        assert f"{oldest}.0" in SpecifierSet(found["Requires-Python"] or ""), requirement
