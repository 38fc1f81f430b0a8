"""The commands that are printed, as a shell reads them."""

import os
import subprocess

import pytest

from tuner.system import commands

WORDS = [
    "qlora_output",
    "my adapter",
    "it's",
    "$(id); `id`",
    "~/a*",
    "",
    "a\nb\t\\n'q'",
    "red \x1b[31m",
    "right \u202e to left, ё",
    "delete \x7fF1",
    os.fsdecode(b"no \xff text"),
]


@pytest.mark.parametrize("word", WORDS, ids=ascii)
def test_a_shell_reads_a_quoted_word_as_it_was_and_a_terminal_shows_it_as_text(word):
    quoted = commands.quote(word)
    assert quoted.isprintable()
    output = subprocess.run(["bash", "-c", f"printf %s {quoted}"], capture_output=True, check=True).stdout
    assert output == os.fsencode(word)


def test_half_a_surrogate_pair_can_be_printed():
    assert commands.quote("\ud800").isascii()


def test_a_command_has_the_flags_that_are_set():
    assert commands.command("merge.py", adapter=None, overwrite=False) == "python merge.py"
    command = commands.command("train_qlora.py", learning_rate=0, output="-a b", resume=True)
    assert command == "python train_qlora.py --learning-rate 0 '--output=-a b' --resume"
