"""Cases for Triton's interpreter; run by `test_interpreter.py` in a process of its own."""

import pytest
import torch

from bitmill_kernels import reference
from bitmill_kernels.gptq.code_descent import descend_block


@pytest.mark.parametrize(("width", "R", "C"), [(3, 8, 128), (1, 13, 36), (8, 13, 36), (8, 1, 1)])
def test_codes_equal_those_of_the_plain_sweep(width, R, C):
    generator = torch.Generator().manual_seed(width * 1000 + R + C)
    x = torch.randn(3 * C + 8, C, generator=generator)
    H = x.t() @ x / len(x)
    slope = torch.randn(R, C + 3, generator=generator)[:, 1 : C + 1]
    codes = torch.randint(0, 2**width, (R, C), generator=generator, dtype=torch.uint8)
    scale = torch.rand(R, generator=generator) + 0.1
    scale[0] = 0.0
    new, change = descend_block(codes, slope, H, scale, 2**width - 1, backend="triton")
    plain, plain_change = reference.descend_block(codes, slope, H, scale, 2**width - 1)
    assert torch.equal(new, plain)
    assert torch.allclose(change, plain_change, atol=1e-5)
