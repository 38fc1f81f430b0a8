"""merge.py --gguf: what is written beside the merged model, when it is refused, and what a kill leaves."""

import json
import multiprocessing
import os
import shlex
import shutil
import signal
import sys

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

import merge
from tests.support.merging import refused, run, run_well
from tests.support.processes import disk_for
from tests.support.rows import row
from tests.support.scripts import run_main
from tuner.inference import probes
from tuner.model import folders, gguf_files, gguf_writing
from tuner.system import atomic
from tuner.training import merging


@pytest.fixture(autouse=True)
def one_probe(monkeypatch, tmp_path):
    """Ask one probe for a short answer: it is not the answers that are tested."""
    path = tmp_path / "one.json"
    path.write_text(json.dumps(row("Привет!", "Да.")))
    monkeypatch.setattr(merge, "PROBES", str(path))
    monkeypatch.setattr(probes, "MAX_NEW_TOKENS", 8)


@pytest.fixture(scope="module")
def merged(adapter, tmp_path_factory):
    """A folder that is merged, without a GGUF."""
    folder = tmp_path_factory.mktemp("merged")
    path = folder / "one.json"
    path.write_text(json.dumps(row("Привет!", "Да.")))
    flags = ["--adapter", adapter, "--output", folder / "out", "--probes", path]
    assert run_main(merge.main, *flags)[0] == 0
    return folder / "out"


@pytest.fixture
def output(merged, tmp_path):
    return shutil.copytree(merged, tmp_path / "work/out")


def names(output):
    return sorted(path.name for path in output.parent.iterdir())


def types(path):
    return {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def forbid_merging(monkeypatch):
    monkeypatch.setattr(merging, "load_with_adapter", lambda *_: pytest.fail("merged"))


# ------------------------------------------------------------------------------------------------ written


def test_it_merges_and_writes_two_files_beside_the_folder(adapter, tmp_path):
    output = tmp_path / "work/it's"
    output.parent.mkdir()
    stdout = run_well(adapter, output, "--gguf", "q8_0")
    assert names(output) == ["it's", "it's.Modelfile", "it's.gguf"]
    assert folders.missing_files(output) == []
    assert types(f"{output}.gguf") == {"F32", "Q8_0"}
    assert (output.parent / "it's.Modelfile").read_text() == gguf_files.modelfile(output)
    quoted = str(output).replace("'", "'\"'\"'")
    end = (
        f"gguf       {output}.gguf, q8_0, 0.0 GB\n"
        f"ollama     {output}.Modelfile\n"
        f"next       python compare.py --merged '{quoted}'\n"
        f"           llama-server -m '{quoted}.gguf' --jinja --skip-chat-parsing --temp 0 --port 8000\n"
        f"           ollama create 'it'\"'\"'s' -f '{quoted}.Modelfile'\n"
    )
    assert stdout.endswith(end)


def test_a_merged_model_that_is_there_is_proved_and_not_merged_again(adapter, output, monkeypatch):
    forbid_merging(monkeypatch)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    stdout = run_well(adapter, output, "--gguf", "bf16")
    assert stdout.startswith(f"proof      {output} is {adapter} merged into ")
    assert types(f"{output}.gguf") == {"F32", "BF16"}
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert names(output) == ["out", "out.Modelfile", "out.gguf"]


def test_a_model_that_another_adapter_made_is_not_taken_for_this_ones(adapter, output, tmp_path, monkeypatch):
    forbid_merging(monkeypatch)
    other = shutil.copytree(adapter, tmp_path / "other")
    path = other / "adapter_model.safetensors"
    save_file({name: 2 * weight for name, weight in load_file(path).items()}, path)
    result = run(other, output, "--gguf", "q8_0")
    refused(result, f"{output} is not {other} merged into its base: ")
    assert result[2].endswith(" off); add --overwrite to merge again\n")
    assert names(output) == ["out"]


def test_a_damaged_model_that_is_there_is_one_line(adapter, output):
    weights = output / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    refused(run(adapter, output, "--gguf", "q8_0"), f"{output} is damaged (model.safetensors: ")


def test_overwrite_merges_again_and_replaces_both_files(adapter, output):
    (output / "config.json").write_text((output / "config.json").read_text() + " ")
    for suffix in (".gguf", ".Modelfile"):
        output.with_name(f"out{suffix}").write_text("old")
    run_well(adapter, output, "--gguf", "q8_0", "--overwrite")
    assert not (output / "config.json").read_text().endswith(" ")
    assert types(f"{output}.gguf") == {"F32", "Q8_0"}
    assert output.with_name("out.Modelfile").read_text() == gguf_files.modelfile(output)


def test_a_link_leads_to_where_the_file_is(adapter, output, tmp_path):
    (tmp_path / "disk").mkdir()
    output.with_name("out.gguf").symlink_to(tmp_path / "disk/model.gguf")
    run_well(adapter, output, "--gguf", "q8_0")
    assert output.with_name("out.gguf").is_symlink()
    assert types(tmp_path / "disk/model.gguf") == {"F32", "Q8_0"}


# ------------------------------------------------------------------------------------------------ refused


def test_a_file_in_the_way_is_told_before_anything_is_loaded(adapter, output, tmp_path, monkeypatch):
    forbid_merging(monkeypatch)
    for name in ("new.gguf", "out.gguf"):
        output.with_name(name).write_text("mine")
    for folder in (output.with_name("new"), output):
        refused(run(adapter, folder, "--gguf", "q8_0"), f"{folder}.gguf exists; add --overwrite")
        assert folder.with_name(f"{folder.name}.gguf").read_text() == "mine"


def test_a_missing_package_is_told_before_anything_is_loaded(adapter, output, monkeypatch):
    forbid_merging(monkeypatch)
    monkeypatch.setitem(sys.modules, "gguf", None)
    result = run(adapter, output.with_name("new"), "--gguf", "q8_0")
    refused(result, "the package gguf is not installed; type: pip install -r requirements.txt")


def test_a_type_that_it_does_not_write_is_refused(adapter, output):
    code, _, stderr = run(adapter, output, "--gguf", "q4_k_m")
    assert code == 2
    assert "invalid choice: 'q4_k_m'" in stderr


def test_a_disk_without_room_for_it_is_told_before_anything_is_loaded(adapter, output, monkeypatch):
    forbid_merging(monkeypatch)
    monkeypatch.setattr(gguf_writing, "gguf_bytes", lambda folder, kind: 10**15)
    refused(run(adapter, output.with_name("new"), "--gguf", "q8_0"), "not enough disk space")
    refused(run(adapter, output, "--gguf", "q8_0"), "out.gguf needs 1000000.0 GB of free disk")
    assert names(output) == ["out"]


# ---------------------------------------------------------------------------------------- half way through


def test_on_a_full_disk_the_merged_model_stays_and_the_cure_writes_the_rest(adapter, output):
    run_well(adapter, output, "--gguf", "bf16")
    whole = output.with_name("out.gguf").read_bytes()
    size = (output / "model.safetensors").stat().st_size
    assert size < len(whole)
    with disk_for((size + len(whole)) // 2):
        result = run(adapter, output, "--gguf", "bf16", "--overwrite")
    problem = f"{output}.gguf cannot be written (File too large); {output} is complete"
    refused(result, f"{problem}; free some disk space, then type: ")
    assert names(output) == ["out"]
    command = shlex.split(result[2].split("then type: ")[1])
    assert command[:2] == ["python", "merge.py"]
    assert "--overwrite" not in command
    code, stdout, stderr = run_main(merge.main, *command[2:])
    assert (code, stderr) == (0, "")
    assert stdout.startswith("proof")
    assert output.with_name("out.gguf").read_bytes() == whole


@pytest.fixture(scope="module")
def processes():
    """A server of processes that have the libraries imported when they start."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.scripts.test_merge_gguf"])
    return context


def killed_at(moment, adapter, output, probe):
    """Write the GGUF in a process that kills itself before it writes a tensor, or while it syncs the file."""
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    write, left = gguf_writing.StreamedTensor.tofile, [moment]

    def tofile(self, file):
        left[0] = left[0] and left[0] - 1
        if left[0] == 0 and moment:
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, file)

    def fsync_tree(path):
        os.kill(os.getpid(), signal.SIGKILL)

    gguf_writing.StreamedTensor.tofile = tofile
    if not moment:
        atomic.fsync_tree = fsync_tree
    sys.argv = ["merge.py", "--adapter", str(adapter), "--output", str(output), "--probes", probe]
    sys.argv += ["--gguf", "q8_0"]
    merge.main()


@pytest.mark.parametrize("moment", [1, 9, 27, 0])
def test_killed_it_leaves_no_half_file_and_the_next_run_clears_up(processes, adapter, output, moment):
    process = processes.Process(target=killed_at, args=(moment, adapter, output, merge.PROBES))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not output.with_name("out.gguf").exists()
    (part,) = output.parent.glob(".out.gguf.*.part/new")
    assert part.stat().st_size > 10_000
    assert folders.missing_files(output) == []
    run_well(adapter, output, "--gguf", "q8_0")
    assert names(output) == ["out", "out.Modelfile", "out.gguf"]
    assert types(f"{output}.gguf") == {"F32", "Q8_0"}
