"""Whether the base can be had, and where its tokenizer is found: in a folder, a cache or a package."""

import shutil
import subprocess

import pytest
from safetensors.torch import load_file, save_file

from tuner.model import access, hub
from tuner.system.errors import UserError


def test_without_any_tokenizer_one_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code = "from tuner.model import small_model; small_model.SMALL_PACKAGE = 'none'; "
    code += "small_model.build_tokenizer('x')"
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda args, **k: run([*args[:2], code], **k))
    with pytest.raises(UserError) as caught:
        access.find_tokenizer("google/gemma-3-4b-it", online=False)
    assert str(caught.value).startswith("no tokenizer of google/gemma-3-4b-it is here, and the packages")
    assert str(caught.value).endswith("type: pip install -r requirements-rehearsal.txt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "marks"),
    [
        (None, ["✓ token", "✓ license"]),
        (("no token (401)", "token"), ["✗ token", "– license"]),
        (("license not accepted (403)", "license"), ["✓ token", "✗ license"]),
        (("hub unreachable", "hub"), ["✓ token", "✗ hub", "– license"]),
    ],
)
def test_access_says_what_stands_in_the_way(monkeypatch, error, marks):
    def ask(repo):
        if error:
            raise UserError(*error)
        return "commit", []

    monkeypatch.setattr(hub, "ask_hub", ask)
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    lines = access.check_model("google/gemma-3-4b-it", offline=False)
    assert [f"{mark} {text.split(':')[0]}" for mark, text in lines][: len(marks)] == marks
    assert "hf_planted" not in str(lines)


def test_offline_asks_no_hub(monkeypatch):
    monkeypatch.setattr(hub, "ask_hub", lambda repo: pytest.fail("the hub was asked"))
    assert access.check_model("google/gemma-3-4b-it", offline=True)[0][0] == "–"


def test_a_base_that_is_not_in_bf16_is_said_to_be_rounded(tiny_text_model, tmp_path):
    base = shutil.copytree(tiny_text_model, tmp_path / "base")
    weights = {name: w.float() for name, w in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors")
    line = access.check_model(str(base), offline=True)[0]
    assert line == ("✓", f"model: {base} (F32: merge.py merges it as it is rounded to bf16)")


def test_a_model_folder_is_looked_into(tiny_text_model, tmp_path):
    assert access.check_model(tiny_text_model, offline=False)[0] == ("✓", f"model: {tiny_text_model}")
    mark, text = access.check_model(str(tmp_path), offline=False)[0]
    assert (mark, text) == (
        "✗",
        f"model: {tmp_path} is not a complete model folder (config.json missing); check --model",
    )
    mark, text = access.check_model(f"{tmp_path}/nope", offline=False)[0]
    assert (mark, text) == ("✗", f"model: {tmp_path}/nope does not exist; check --model")
