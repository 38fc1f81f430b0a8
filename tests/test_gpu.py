"""What only a CUDA GPU can show, on random weights of the 4B dimensions: `pytest -m gpu`, some minutes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_tokenizer

from benchmarks import random_gemma_4b

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the random model, as gemma-3-4b-it, and the shipped rows."""
    folder = tmp_path_factory.mktemp("gpu")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")  # its 512 ids are among the 262,208
    random_gemma_4b.write(folder / "gemma-3-4b-it", folder / "tokenizer", "cuda", random_gemma_4b.config())
    torch.cuda.empty_cache()
    (folder / "examples.json").write_bytes((ROOT / "examples.json").read_bytes())
    return folder


def start(folder, *arguments, before="pass", dropout=0.1):
    """Starts train_qlora.py; `before` is done in its process right before training."""
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import torch, train_qlora\n"
        f"train_qlora.LORA_DROPOUT = {dropout}\n"
        "real = train_qlora.train\n"
        "def train(*args):\n"
        "    torch.cuda.empty_cache()\n"
        f"    {before}\n"
        "    return real(*args)\n"
        "train_qlora.train = train\n"
        "train_qlora.main()\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def finish(process):
    out, errors = process.communicate()
    print(out, errors)
    assert "Traceback" not in errors
    return process.returncode, out, errors


def run_json(path):
    return json.loads((path / "run.json").read_text())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_resumed_run_gives_the_losses_of_one_that_was_not_stopped(folder, bits):
    arguments = ["--epochs", 3, "--bits", bits]
    assert finish(start(folder, *arguments, "--output", f"whole{bits}"))[0] == 0
    process = start(folder, *arguments, "--output", f"stopped{bits}")
    for line in process.stdout:
        if line.startswith("epoch  1/3"):
            break
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code, out, _ = finish(process)
    seconds = time.monotonic() - began
    print(f"left {seconds:.1f} s after the signal")
    assert code == 143
    assert seconds < 30
    assert re.search("^stopped    the newest checkpoint is ", out, re.M)
    assert finish(start(folder, *arguments, "--output", f"stopped{bits}", "--resume"))[0] == 0
    whole, resumed = (run_json(folder / f"{name}{bits}") for name in ("whole", "stopped"))
    assert len(resumed["resumed_at"]) == 1
    difference = max(abs(a - b) for a, b in zip(whole["losses"], resumed["losses"], strict=True))
    print(f"{bits} bits: the losses differ by at most {difference:.2g}")
    assert difference < 1e-3
    for one, other in zip(whole["evaluations"], resumed["evaluations"], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-3)


def cap(gib):
    """Has the process get so much GPU memory and no more."""
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    return f"torch.cuda.set_per_process_memory_fraction({gib / total})"


def test_with_too_little_memory_the_micro_batch_is_halved_and_the_losses_are_the_same(folder):
    arguments = ["--epochs", 1, "--output"]
    assert finish(start(folder, *arguments, "roomy", dropout=0.0))[0] == 0
    roomy = run_json(folder / "roomy")
    gib = roomy["peak_memory_gib"]["allocated"] - 0.15
    code, out, _ = finish(start(folder, *arguments, "capped", before=cap(gib), dropout=0.0))
    assert code == 0
    assert re.search(
        r"^memory     full with \d+ tokens at a time; the same again with \d+ at most$", out, re.M
    )
    capped = run_json(folder / "capped")
    assert capped["losses"] == pytest.approx(roomy["losses"], abs=1e-3)


def test_with_no_memory_for_a_row_it_says_so_with_the_numbers(folder):
    code, _, errors = finish(start(folder, "--epochs", 1, "--output", "none", before=cap(3.1)))
    assert code == 1
    assert re.search(
        r"^the GPU's memory is full with one row of \d+ tokens \(.*MiB.*\); train with", errors, re.M
    )
    assert not (folder / "none").exists()
