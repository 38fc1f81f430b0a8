"""The command that is printed for an unfinished run is the one that resumes it, whatever a manifest says."""

import json
import shlex
import sys
from types import SimpleNamespace

import pytest

import train_qlora
from tests.support.training import recipe
from tuner.system.errors import UserError
from tuner.training import adapter_folder, run_command

NAMES = (
    "rehearse",
    "bits",
    "epochs",
    "rows_per_step",
    "learning_rate",
    "seed",
    "data",
    "model",
    "output",
    "resume",
)
RUN = {"data": "my rows.json", "model": "-base", "settings": recipe(bits=8, rehearse=True, seed=7).settings()}


def unfinished(output, manifest, step=4):
    """Write the folder of an unfinished run, as far as it is read; return what is said of it."""
    folder = output / f"checkpoints/step-{step:06}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(manifest if isinstance(manifest, str) else json.dumps(manifest))
    (folder / "adapter_model.safetensors").touch()
    with pytest.raises(UserError) as error:
        adapter_folder.read_adapter(output)
    assert str(error.value).isprintable()
    return str(error.value)


def parsed(command, monkeypatch):
    words = shlex.split(command)
    assert words[:2] == ["python", "train_qlora.py"]
    monkeypatch.setattr(sys, "argv", words[1:])
    args = train_qlora.parse_arguments()
    return {name: getattr(args, name) for name in NAMES}


def test_it_has_the_flags_that_the_run_began_with(tmp_path, monkeypatch):
    says = unfinished(tmp_path / "it's out", RUN)
    says, command = says.split("; resume with: ")
    assert says == f"{tmp_path}/it's out holds an unfinished run"
    assert parsed(command, monkeypatch) == {
        **{
            "rehearse": True,
            "bits": 8,
            "epochs": 10,
            "rows_per_step": 16,
            "learning_rate": 1e-4,
            "seed": 7,
            "data": "my rows.json",
        },
        **{"model": "-base", "output": f"{tmp_path}/it's out", "resume": True},
    }


def test_what_a_run_begins_with_is_what_a_manifest_says():
    args = SimpleNamespace(data="my rows.json", model="-base", output="out")
    assert run_command.begun_with(args) == {"data": "my rows.json", "model": "-base"}


@pytest.mark.parametrize(
    "manifest",
    [
        "{",
        "[]",
        "[" * 100_000,
        {"settings": None},
        {"settings": {"bits": "4; id", "epochs": True, "rehearse": "yes"}, "data": ["a"], "model": {}},
        {"settings": {}, "output": "/", "overwrite": True, "resume": False},
    ],
    ids=lambda manifest: str(manifest)[:20],
)
def test_what_is_no_flag_is_left_out(tmp_path, manifest):
    says = unfinished(tmp_path / "out", manifest)
    assert says.endswith(f"resume with: python train_qlora.py --output {tmp_path}/out --resume")


def test_a_strangers_names_are_quoted(tmp_path):
    names = {"data": "$(id)\x1b[2J\n'x'", "model": "a; `id` \u202e"}
    says = unfinished(tmp_path / "out", {"settings": {}, **names})
    assert "--data $'$(id)\\x1b[2J\\x0a\\'x\\'' --model $'a; `id` \\xe2\\x80\\xae' --output" in says


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    unfinished(tmp_path / "out", RUN, step=4)
    assert "--data 'my rows.json'" in unfinished(tmp_path / "out", "cut", step=8)
