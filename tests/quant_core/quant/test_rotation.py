import pytest
import torch

from bitmill.quant.rewrites import ColumnOrder, Rewrites
from bitmill.quant.rotation import Rotation, rotate, signs

CPU = torch.device("cpu")


@pytest.mark.parametrize("K", [1, 3, 16, 100, 128, 129, 320])
def test_the_rotation_is_orthogonal_and_undone_exactly(K):
    turned = rotate(torch.eye(K, dtype=torch.float64))
    torch.testing.assert_close(turned @ turned.T, torch.eye(K, dtype=torch.float64))
    W = torch.randn(5, K, dtype=torch.float64)
    torch.testing.assert_close(Rotation().undo(Rotation().weights(W)), W)


@pytest.mark.parametrize("K", [100, 300])
def test_a_rotated_linear_computes_the_same(K):
    draw = torch.Generator().manual_seed(0)
    W, x = (torch.randn(7, K, generator=draw, dtype=torch.float64) for _ in range(2))
    order = torch.randperm(K, generator=draw).int()
    rewrites = Rewrites([ColumnOrder(order), Rotation()])
    inner = rewrites.weights(W)
    torch.testing.assert_close(rewrites.forward(x, lambda x: x @ inner.T), x @ W.T)
    turned = rotate(x[:, order.long()])
    torch.testing.assert_close(rewrites.hessian(x.T @ x), turned.T @ turned)
    torch.testing.assert_close(rewrites.moments(W.T @ x), W.T @ turned)


def test_groups_stay_apart_and_a_tail_is_cut_into_powers_of_two():
    turned = rotate(torch.eye(228, dtype=torch.float64)) != 0
    for start, end in ((0, 128), (128, 192), (192, 224), (224, 228)):
        assert turned[start:end, start:end].all()
        turned[start:end, start:end] = False
    assert not turned.any()


def test_signs_are_those_of_the_format():
    """Stored checkpoints depend on them: the first 32, and all of 8192, as bits."""
    bits = (signs(8192, CPU) < 0).long()
    assert int((bits[:32] << torch.arange(32)).sum()) == GOLDEN
    assert abs(float(signs(8192, CPU).mean())) < 0.05
    assert torch.equal(signs(40, CPU), signs(8192, CPU)[:40])


GOLDEN = 0x7F4DD192
