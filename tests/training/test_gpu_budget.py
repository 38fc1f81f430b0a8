"""What fits a GPU's memory, without a GPU."""

import re

import pytest
import torch

from benchmarks import random_gemma_4b
from tests.support.training import CPU, fake_cuda, recipe
from tuner.system.errors import UserError
from tuner.training import gpu_budget


def test_what_fits_the_memory_is_said_and_what_does_not_is_refused(monkeypatch, tmp_path, capsys):
    fake_cuda(monkeypatch)
    shares = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (22 * 2**30, 24 * 2**30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    random_gemma_4b.config().save_pretrained(tmp_path)

    def plan(memory, longest, bits=4):
        steps = [[20] * 8, [20] * 7 + [longest]]
        workload = gpu_budget.Workload(steps, longest, trained=128, total=sum(map(sum, steps)))
        return gpu_budget.plan_memory(memory, recipe(bits=bits), tmp_path, workload, CPU)

    assert plan(12, 49).tokens > plan(6, 49).tokens > 49
    assert shares == [0.5, 0.25]
    assert plan(None, 49).tokens == plan(0.9 * 22, 49).tokens
    assert plan(6, 49).tokens > plan(6, 2048).tokens > 0 == plan(3.8, 153).tokens
    recomputed = "tokens at once, with gradient checkpointing"
    lines = capsys.readouterr().out.splitlines()
    graphs = "up to 6.0 GiB: 256 tokens at once, as CUDA graphs"
    assert lines[-2] == f"memory     {graphs}; longer rows 2048 {recomputed}"
    assert re.fullmatch(rf"memory     up to 3\.8 GiB: \d+ {recomputed}", lines[-1])
    for arguments, says in [
        ((23, 49), r"--memory 23: 22.0 GiB are free on this GPU; ask for less"),
        ((3, 49), r"3.0 GiB of GPU memory is too little: 4 bits and a row of 49 tokens need 3.6; allow more"),
        ((5, 49, 8), r"5.0 GiB .* 8 bits and a row of 49 tokens need 5.2; .*, use --bits 4, shorter rows"),
        ((None, 49), r"2.7 GiB .* need 3.6; close what else runs on it \(nvidia-smi\), use shorter rows or"),
    ]:
        if arguments[0] is None:
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 * 2**30, 24 * 2**30))
        with pytest.raises(UserError, match=says):
            plan(*arguments)
    fake_cuda(monkeypatch, capability=(7, 5), bf16=False)
    assert plan(None, 49) is None
    with pytest.raises(UserError, match="--memory needs a GPU with bf16"):
        plan(12, 49)
