import pytest
import torch

from bitmill_kernels.substitution import cholesky_solve, substitute


@pytest.mark.parametrize("K", [1, 64, 150])
def test_blocks_solve_what_the_whole_does(K):
    generator = torch.Generator().manual_seed(K)
    x = torch.randn(2 * K, K, generator=generator)
    lower = torch.linalg.cholesky(x.T @ x / len(x) + 0.1 * torch.eye(K))
    right = torch.randn(7, K, generator=generator).T
    exact = torch.cholesky_solve(right.double(), lower.double())
    for found in (substitute(lower, right, block=64), cholesky_solve(lower, right)):
        assert found.dtype == torch.float32
        assert torch.allclose(found.double(), exact, rtol=1e-3, atol=1e-4)
