"""Read the programs that the docs show."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def client_example():
    """Return the client's program in docs/serving.md, and the output that is shown for it."""
    blocks = (ROOT / "docs/serving.md").read_text(encoding="utf-8").split("## From Python")[1].split("```")
    assert blocks[1].startswith("python\n")
    return blocks[1].removeprefix("python\n"), blocks[3].lstrip("\n")
