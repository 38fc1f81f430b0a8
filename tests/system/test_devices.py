"""What the CPU or GPU computes is checked before anything is trained on it."""

import bitsandbytes
import pytest
import torch

from tuner.system import devices
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
