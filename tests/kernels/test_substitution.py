import pytest
import torch

from bitmill_kernels.linalg.substitution import Substitution, cholesky_solver, invert, lower_inverse


def lower_of(K):
    generator = torch.Generator().manual_seed(K)
    x = torch.randn(2 * K, K, generator=generator)
    lower = torch.linalg.cholesky(x.T @ x / len(x) + 0.1 * torch.eye(K))
    return lower, torch.randn(7, K, generator=generator).T


@pytest.mark.parametrize(("K", "block"), [(1, 64), (64, 64), (150, 64), (300, 256), (600, 256)])
def test_blocks_solve_what_the_whole_does(K, block):
    lower, right = lower_of(K)
    exact = torch.cholesky_solve(right.double(), lower.double())
    for solver in (Substitution(lower, block=block), cholesky_solver(lower)):
        for _ in range(2):
            found = solver(right)
            assert found.dtype == torch.float32
            assert torch.allclose(found.double(), exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("K", "block"), [(1, 64), (64, 64), (150, 64), (300, 256), (600, 256)])
def test_blocks_invert_what_the_whole_does(K, block):
    lower, _ = lower_of(K)
    exact = torch.linalg.inv(lower.double())
    for found in (invert(lower, block=block), lower_inverse(lower)):
        assert torch.equal(found, found.tril())
        assert torch.allclose(found.double(), exact, rtol=1e-3, atol=1e-4)
