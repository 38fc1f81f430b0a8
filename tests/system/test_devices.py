"""What the CPU or GPU computes is checked before anything is trained on it."""

import bitsandbytes
import pytest
import torch

from tests.support.training import fake_cuda
from tuner.system import devices, hardware
from tuner.system.errors import UserError


@pytest.mark.parametrize("bits", [4, 8])
def test_a_wrong_product_of_bitsandbytes_is_refused(monkeypatch, bits):
    devices.check_quantized_matmul(bits, "cpu", torch.float32)
    if bits == 4:
        right = bitsandbytes.matmul_4bit
        monkeypatch.setattr(bitsandbytes, "matmul_4bit", lambda *a, **k: right(*a, **k) * 1.1)
    else:
        right = bitsandbytes.nn.Linear8bitLt.forward
        monkeypatch.setattr(bitsandbytes.nn.Linear8bitLt, "forward", lambda self, x: right(self, x) * 1.2)
    with pytest.raises(UserError, match=f"multiplies wrongly in {bits} bits"):
        devices.check_quantized_matmul(bits, "cpu", torch.float32)


def test_bf16_where_the_gpu_has_it_and_fp32_on_a_t4(monkeypatch):
    fake_cuda(monkeypatch)
    assert devices.gpu_dtype() == torch.bfloat16
    fake_cuda(monkeypatch, capability=(7, 5), bf16=False)
    assert devices.gpu_dtype() == torch.float32


@pytest.mark.parametrize(
    ("cuda", "driver", "says"),
    [
        (None, False, "no CUDA GPU on this machine"),
        (None, True, "is built for CPUs only, but this machine has an NVIDIA driver"),
        ("13.0", True, "cannot use this machine's GPU"),
    ],
)
def test_without_a_usable_gpu_one_line_names_the_cures(monkeypatch, cuda, driver, says):
    fake_cuda(monkeypatch, available=False, cuda=cuda)
    monkeypatch.setattr(hardware.shutil, "which", lambda name: "/usr/bin/nvidia-smi" if driver else None)
    monkeypatch.setattr(hardware.os.path, "exists", lambda path: False)
    with pytest.raises(UserError, match=says) as caught:
        devices.gpu_dtype()
    assert "\n" not in str(caught.value)
    assert "python train_qlora.py --rehearse" in str(caught.value)


def test_a_gpu_too_old_is_refused(monkeypatch):
    fake_cuda(monkeypatch, capability=(6, 1))
    with pytest.raises(UserError, match=r"too old \(compute capability 6.1\)"):
        devices.gpu_dtype()


def test_a_gpu_is_described_with_what_bitsandbytes_gives_on_it(monkeypatch):
    fake_cuda(monkeypatch, capability=(7, 5), bf16=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (14 * 2**30, 15 * 2**30))

    def multiply(bits, device, dtype):
        assert (device, dtype) == ("cuda:0", torch.float32)
        if bits == 8:
            raise UserError("bitsandbytes multiplies wrongly")

    monkeypatch.setattr(devices, "check_quantized_matmul", multiply)
    lines = devices.check_gpu()
    assert [mark for mark, _ in lines] == ["✓", "✓", "✗"]
    assert lines[0][1].startswith("GPU: Test GPU, 14.0 of 15.0 GiB free, compute capability 7.5, no bf16")
    fake_cuda(monkeypatch, available=False)
    assert devices.check_gpu()[0][0] == "✗"


def test_memory_is_printed_by_what_it_is_the_peak_of():
    peak = devices.peak_memory(torch.device("cpu"))
    assert 0 < peak["resident"] < 1000
    assert devices.format_memory({"resident": 4.257}) == "peak RAM 4.26 GiB"
    memory = devices.format_memory({"allocated": 3.0, "reserved": 4.5})
    assert memory == "peak GPU memory allocated 3.00 GiB, reserved 4.50 GiB"
