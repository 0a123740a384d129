"""Cases for Triton's interpreter: divergences against those of plain torch and of fp64."""

import pytest
import torch

from bitmill_kernels.divergence.divergence import divergence
from divergences import CASES, case, exact


@pytest.mark.parametrize("N", [1, 5, 1024, 2500])
@pytest.mark.parametrize("kind", CASES)
def test_the_kernel_gives_the_plain_divergence(N, kind):
    y, d = case(kind, 7, N)
    source = torch.log_softmax(y, 1)
    found = divergence(source, d, backend="triton")
    plain = divergence(source, d, backend="reference")
    assert torch.allclose(found, plain, rtol=1e-4, atol=1e-6)
    assert torch.allclose(found.double(), exact(y, d), rtol=1e-4, atol=1e-6)


def test_no_rows_give_no_divergences():
    assert divergence(torch.empty(0, 5), torch.empty(0, 5), backend="triton").shape == (0,)
