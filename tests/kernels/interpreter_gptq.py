"""Cases for Triton's interpreter; run by `test_interpreter.py` in a process of its own."""

import pytest
import torch

from bitmill_kernels import reference
from bitmill_kernels.gptq.block import gptq_block


@pytest.mark.parametrize(
    ("width", "R", "C"),
    [(1, 8, 128), (2, 13, 128), (3, 3, 64), (4, 5, 100), (8, 9, 36), (8, 1, 1)],
)
def test_codes_equal_those_of_the_plain_loop(width, R, C):
    generator = torch.Generator().manual_seed(width * 1000 + R + C)
    wide = torch.randn(R, C + 3, generator=generator)
    w = wide[:, 1 : C + 1]
    u = torch.eye(C) + 0.1 * torch.randn(C, C, generator=generator).triu(1)
    scale = (w.amax(1) - w.amin(1)).clamp(min=0.1) / (2**width - 1)
    zero = (-w.amin(1) / scale).round()
    scale[0] = 0.0
    codes, error = gptq_block(w, u, scale, zero, 2**width - 1, backend="triton")
    plain_codes, plain_error = reference.gptq_block(w, u, scale, zero, 2**width - 1)
    assert torch.equal(codes, plain_codes)
    assert torch.allclose(error, plain_error, atol=1e-5)


def test_halves_round_to_even():
    w = torch.tensor([[0.5, 1.5, 2.5, 3.5, -0.5]])
    one = torch.ones(1)
    codes, _ = gptq_block(w, torch.eye(5), one, torch.zeros(1), 7, backend="triton")
    assert codes.tolist() == [[0, 2, 2, 4, 0]]
