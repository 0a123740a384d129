"""Costs from energies against real encodings."""

import pytest
import torch

from bitmill.quant.rotation import packed_rewrites
from bitmill.sensitivity.trellis import carried_on, trellis_costs
from bitmill.solvers.factor import factor
from bitmill.solvers.trellis import encode_siblings


def layer(N=48, K=300, seed=0):
    draw = torch.Generator().manual_seed(seed)
    mix = torch.eye(K) + 0.15 * torch.randn(K, K, generator=draw)
    energy = torch.exp(torch.randn(K, generator=draw))
    x = torch.randn(4 * K, K, generator=draw) @ mix * energy
    sizes = torch.exp(0.3 * torch.randn(N, 1, generator=draw))
    return 0.05 * torch.randn(N, K, generator=draw) * sizes, x.T @ x / len(x)


@pytest.mark.parametrize("spread", [0.3, 1.5])
@pytest.mark.parametrize("rate", [1, 2, 3, 4])
def test_costs_are_near_those_of_encoded_groups(rate, spread):
    """Of rows that count alike, and of such that do not."""
    W, H = layer()
    rewrites = packed_rewrites("trellis", H.diagonal().argsort(descending=True).int())
    upper = factor(rewrites.hessian(H)).upper
    metric = torch.linalg.inv(upper.T.double() @ upper.double())
    draw = torch.Generator().manual_seed(1)
    q = torch.exp(spread * torch.randn(len(W), generator=draw, dtype=torch.float64))
    costs = trellis_costs(W, q, upper, (rate, 8), rewrites)
    [codes] = encode_siblings([rewrites.weights(W)], upper, [(rate,) * 3], importance=[q.float()])
    R = (rewrites.weights(W) - codes.packed_values()).double()
    measured = 0.5 * float((q * ((R @ metric) * R).sum(1)).sum())
    assert costs[:, 0].sum() == pytest.approx(measured, rel=0.12)
    assert (costs[:, 1] < 0.01 * costs[:, 0]).all()


@pytest.mark.parametrize("K", [32, 40])
def test_errors_carried_on_are_those_of_single_tiles(K):
    _, H = layer(K=K)
    upper = factor(H).upper
    loss, carried = carried_on(upper)
    last = slice(16 * ((K - 1) // 16), K)
    assert float(loss[-1]) == pytest.approx(
        float(torch.linalg.inv(upper[last, last]).square().sum())
    )
    reach = torch.linalg.inv(upper[:16, :16]) @ upper[:16, last]
    assert float(carried[0, -1]) == pytest.approx(float(reach.square().sum(0).mean()))
    assert not carried.tril().any()


def test_small_inputs_leave_costs_of_a_tile_that_is_not_whole():
    """They are those of larger ones in another unit."""
    _, H = layer(K=40)
    whole, _ = carried_on(factor(H).upper)
    small, _ = carried_on(factor(H * 2.0**-40).upper)
    assert (small * 2.0**40).tolist() == pytest.approx(whole.tolist())
