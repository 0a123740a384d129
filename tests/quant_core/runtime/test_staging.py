"""Weights arrive on a device as they were, whatever their size."""

import pytest
import torch

from bitmill.runtime import staging
from bitmill.runtime.staging import Staging

SHAPES = [(), (0,), (1,), (7, 3), (129, 65)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
def test_copies_hold_the_same_values(device, dtype, monkeypatch):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.setattr(staging, "PIECE_BYTES", 1000)
    copies = Staging(torch.device(device))
    tensors = [torch.randn(shape).mul(50).to(dtype) for shape in SHAPES * 3]
    tensors.append(tensors[4].T)
    found = [copies.to_device(tensor) for tensor in tensors]
    for one, two in zip(tensors, found, strict=True):
        assert two.device.type == device
        assert two.dtype == dtype
        assert torch.equal(one, two.cpu())
