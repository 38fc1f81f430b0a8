"""Where the base model is found."""

import shutil

import pytest

from tuner.model import locate, small_model
from tuner.system.errors import UserError


def test_the_rehearsal_makes_the_small_model_only_where_it_is_missing(tiny_text_model, monkeypatch, tmp_path):
    built = []

    def build_small(folder):
        built.append(folder)
        shutil.copytree(tiny_text_model, folder)

    monkeypatch.setattr(small_model, "build_small", build_small)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        locate.find_model("./gemma-3-270m", rehearse=False)
    for _ in range(2):
        assert locate.find_model("./gemma-3-270m", rehearse=True)[0] == "./gemma-3-270m"
    assert built == ["./gemma-3-270m"]
