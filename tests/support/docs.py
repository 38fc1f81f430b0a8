"""Read the programs and commands that the documentation shows."""

import importlib
import re
from pathlib import Path

from tests.support.scripts import run_main

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNS = sorted((ROOT / "runs").glob("*.sh"))
# A command as it is typed: in a line of its own or between backticks, up to a comment or the next command.
COMMAND = re.compile(r"(?:python(?: -u)?|accelerate launch) ([\w/]+\.py)((?: +[^\s`|;&>)#]+)*)")


def client_example():
    """Return the client's program in docs/serving.md, and the output that is shown for it."""
    blocks = (ROOT / "docs/serving.md").read_text(encoding="utf-8").split("## From Python")[1].split("```")
    assert blocks[1].startswith("python\n")
    return blocks[1].removeprefix("python\n"), blocks[3].lstrip("\n")


def commands(path):
    """Return [(script, [flag, …]), …] of the commands in a page or shell script."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    return [(script, re.findall(r"(?<= )--[\w-]+", rest)) for script, rest in COMMAND.findall(text)]


def flags_of(script):
    """Return the flags of a script, as its own --help lists them."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    code, text, _ = run_main(module.main, "--help")
    assert code == 0
    return set(re.findall(r"(?<![\w-])--[a-z-]+", text.split("options:")[1]))
