"""Where the base model is found."""

import shutil
from pathlib import Path

import pytest

from tuner.model import folders, locate, small_model
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


@pytest.mark.parametrize(
    ("model", "local"),
    [
        ("google/gemma-3-4b-it", False),
        ("./gemma-3-4b-it", True),
        ("gemma-3-4b-it", True),
        ("models/big/gemma", True),
        ("/models/gemma", True),
        ("../gemma", True),
        ("~/gemma", True),
        ("models/gemma 3", True),
        ("C:\\models\\gemma", True),
        ("a/b\n", True),
        ("x" * 5000, True),
        ("\ud800", True),
        ("a\0b", True),
    ],
)
def test_the_hub_is_asked_for_names_of_its_own_form_alone(model, local):
    assert locate.is_local(model) == local


def test_an_adapter_records_a_folder_by_its_absolute_path_and_a_hub_name_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "google/gemma").mkdir(parents=True)
    for model in ("./gemma", "gemma", "models/../gemma"):
        assert locate.record(model) == str(tmp_path / "gemma")
    assert locate.record("google/gemma-3-4b-it") == "google/gemma-3-4b-it"
    assert locate.record("google/gemma") == str(tmp_path / "google/gemma")


@pytest.mark.parametrize(
    ("recorded", "base", "is_found"),
    [
        ("./models/tiny", "run/models/tiny", True),
        ("./models/tiny", "run/tiny", True),
        ("./models/tiny", "here/tiny", True),
        ("models/tiny", "run/models/tiny", True),
        ("models/tiny", "run/tiny", False),  # it may be a name on the hub
        ("/gone/tiny", "run/tiny", True),
        ("/gone/tiny", "here/tiny", True),
        ("/gone/tiny", "run/models/tiny", False),
        ("./tiny/", "run/tiny", True),
        ("tiny", "here/tiny", True),
    ],
)
def test_a_base_that_moved_is_found_by_its_path_or_name(
    tiny_text_model, tmp_path, monkeypatch, recorded, base, is_found
):
    shutil.copytree(tiny_text_model, tmp_path / base)
    (tmp_path / "here").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "here")
    for adapter in ("run/out", "run/out/checkpoints/step-000004"):
        found = locate.find_recorded(recorded, tmp_path / adapter)
        assert (Path(found).absolute() == tmp_path / base) == is_found
        assert is_found or found == recorded


def test_a_model_on_the_hub_that_was_downloaded_here_is_not_fetched(tiny_text_model, tmp_path, monkeypatch):
    name, commit = "google/tiny", "0123456789" * 4
    folder = shutil.copytree(tiny_text_model, tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    assert locate.find_recorded(name, "out", commit) == name  # whatever it is
    folders.write_origin(folder, commit, name)
    assert locate.find_recorded(name, "out", commit) == str(folder)
    for other in ((name, "out", "1" * 40), (name, "out"), ("else/tiny", "out", commit)):
        assert locate.find_recorded(*other) == other[0]


def test_a_folder_that_is_no_model_is_no_base_that_moved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    for recorded in ("/gone/tiny", "/gone/" + "x" * 5000, "\ud800", "a\0b", "google/gemma-3-4b-it"):
        assert locate.find_recorded(recorded, "out") == recorded
    assert locate.find_recorded("./tiny", "out") == "./tiny"  # as it stands there, to be named
