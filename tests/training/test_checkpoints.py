"""Checkpoints: which are kept, what is in one, and that nothing damaged or altered passes for whole."""

import hashlib
import json
import pickle
import re
import shutil
from pathlib import Path

import pytest

from tests.support.training import adapter_bytes, names, recipe, resume, run_json
from tuner.training import adapter_weights, checkpoints


def test_a_checkpoint_an_epoch_of_which_the_newest_two_are_kept(undisturbed):
    assert names(undisturbed / "checkpoints") == ["step-000006", "step-000008"]


def test_the_best_epoch_that_earlier_versions_kept_goes_with_its_checkpoint(undisturbed, tmp_path):
    output = shutil.copytree(undisturbed, tmp_path / "output")
    old = output / "checkpoints/step-000006"
    shutil.copy(old / checkpoints.WEIGHTS, old / "best.safetensors")
    assert checkpoints.read(old).step == 6
    checkpoints.prune(output, 8)
    assert names(output / "checkpoints") == ["step-000006", "step-000008"]
    checkpoints.remove(old)
    assert names(output / "checkpoints") == ["step-000008"]


def test_a_manifest_says_what_is_in_it_and_of_which_run(undisturbed, few_rows):
    folder = undisturbed / "checkpoints/step-000008"
    manifest = json.loads((folder / "manifest.json").read_text())
    files = set(names(folder)) - {"manifest.json"}
    assert set(manifest["sha256"]) == files >= {"adapter_model.safetensors", "optimizer.pt"}
    for name in files:
        assert manifest["sha256"][name] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert manifest["step"] == 8
    assert manifest["data_sha256"] == hashlib.sha256(few_rows.read_bytes()).hexdigest()
    assert manifest["settings"]["learning_rate"] == 3e-3
    assert manifest["settings"]["lora_r"] == 16
    assert manifest["history"]["losses"] == run_json(undisturbed)["losses"]


def test_a_checkpoint_is_an_adapter_that_loads(undisturbed, tiny_text_model):
    adapter_weights.check_adapter(undisturbed / "checkpoints/step-000006", tiny_text_model, None)


@pytest.mark.parametrize("name", ["manifest.json", "adapter_model.safetensors", "optimizer.pt"])
@pytest.mark.parametrize("how", ["gone", "torn", "altered", "a link"])
def test_a_damaged_one_is_named_and_skipped(undisturbed, tmp_path, capsys, name, how):
    output = shutil.copytree(undisturbed, tmp_path / "output")
    path = output / "checkpoints/step-000008" / name
    data = path.read_bytes()
    if how == "torn":
        path.write_bytes(data[: len(data) // 2])
    elif how == "altered":
        at = data.index(b'"step": 8') + 8 if name == "manifest.json" else len(data) // 2
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    else:
        path.unlink()
    if how == "a link":
        (tmp_path / "elsewhere").write_bytes(data)
        path.symlink_to(tmp_path / "elsewhere")
    assert checkpoints.newest(output).step == 6
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert re.match(rf"skipping damaged checkpoint: .*step-000008/{name} (is|has|cannot) ", lines[0])


def test_going_on_from_the_one_before_gives_the_same_adapter(arguments, stopped, undisturbed):
    folder = stopped
    dirs = folder / "qlora_output/checkpoints"
    assert names(dirs) in (
        ["step-000002", "step-000004", "step-000005"],
        ["step-000004", "step-000005"],
    )
    (dirs / "step-000005/optimizer.pt").write_bytes(b"")
    code, out, _ = resume(arguments, folder)
    assert code == 0
    assert re.search(
        "^skipping damaged checkpoint: .*step-000005/optimizer.pt has changed since it was written$",
        out,
        re.M,
    )
    assert "resumed    after step 4 of 8" in out
    assert adapter_bytes(folder / "qlora_output") == adapter_bytes(undisturbed)
    assert "step-000005" not in names(dirs)


def test_an_optimizer_that_would_run_code_is_not_unpickled(arguments, stopped, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "pwned").write_text, ("ha",))

    folder = stopped
    newest = checkpoints.checkpoint_dirs(folder / "qlora_output")[0]
    (newest / "optimizer.pt").write_bytes(pickle.dumps({"optimizer": Evil()}, protocol=2))
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["sha256"]["optimizer.pt"] = hashlib.sha256((newest / "optimizer.pt").read_bytes()).hexdigest()
    manifest["seal"] = checkpoints.seal(manifest)  # as one would who knows how
    (newest / "manifest.json").write_text(json.dumps(manifest))
    code, _, errors = resume(arguments, folder)
    assert code == 1
    assert "the checkpoint of step 5 does not fit" in errors
    assert not (tmp_path / "pwned").exists()


def test_a_checkpoint_of_version_2104ae4_has_no_differences():
    """Its manifest, as that version wrote it: a run that began with it can be resumed."""
    manifest = {
        "format": 2,
        "data_sha256": "3f",
        "settings": {
            "bits": 4,
            "epochs": 10,
            "learning_rate": 0.0001,
            "rehearse": False,
            "lora_r": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.1,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            "exclude_modules": ".*vision_tower.*",
            "rows_per_step": 16,
            "max_grad_norm": 0.3,
            "warmup_steps": 10,
            "warmup_share": 0.25,
            "validation_share": 0.1,
            "seed": 42,
            "max_tokens": 2048,
        },
        "model_sha256": "5a",
        "tokens_sha256": "7c",
        "step": 4,
        "history": {},
    }
    settings = recipe().settings()
    identity = {"format": checkpoints.FORMAT, "data_sha256": "3f", "settings": settings}
    identity |= {"model_sha256": "5a", "tokens_sha256": "7c"}
    assert checkpoints.differences(manifest, identity) == []
    assert checkpoints.differences(manifest, {**identity, "settings": recipe(seed=7).settings()}) == [
        "seed was 42 and is 7"
    ]
    assert checkpoints.differences(manifest, {**identity, "tokens_sha256": "8d"}) == ["the tokens changed"]
