import pytest
import torch

from bitmill.quant.codes import LinearCodes
from bitmill.quant.grid import ClipSettings
from bitmill.solvers.row_gain import LARGEST_GAIN, restore_gain
from bitmill.solvers.rtn import round_to_nearest


def problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(900, 200, generator=generator) @ torch.randn(200, 200, generator=generator)
    W = 0.05 * torch.randn(10, 200, generator=generator)
    H = x.T @ x / 900
    return W, x, H, round_to_nearest(W, (2, 3), H.diagonal(), ClipSettings())


def slopes(W, x, values):
    """Regression of every output on the source's, token by token, in fp64."""
    y, changed = x.double() @ W.double().T, x.double() @ values.double().T
    return (y * changed).sum(0) / (y * y).sum(0)


def test_clipped_rows_shrink_and_the_gain_undoes_it():
    W, x, H, codes = problem()
    before = slopes(W, x, codes.values())
    after = slopes(W, x, restore_gain(W, codes, H).values())
    half = slopes(W, x, restore_gain(W, codes, H, strength=0.5).values())
    assert before.mean() < 0.98
    assert torch.allclose(after, torch.ones(10, dtype=torch.float64), atol=2e-3)
    assert torch.allclose(half, before.sqrt(), atol=2e-3)


def test_only_scales_move_all_groups_of_a_row_alike_and_stay_fp16():
    W, _, H, codes = problem()
    changed = restore_gain(W, codes, H)
    assert torch.equal(changed.codes, codes.codes)
    assert torch.equal(changed.zeros, codes.zeros)
    assert torch.equal(changed.scales, changed.scales.half().float())
    factor = changed.scales / codes.scales
    assert torch.allclose(factor[0], factor[1], rtol=2e-3)


@pytest.mark.parametrize("shrunk", [0.1, -1.0, 0.0])
def test_rows_that_lost_their_output_are_not_blown_up(shrunk):
    W, _, H, codes = problem()
    scales = codes.scales.clone()
    scales[:, 2] *= max(shrunk, 0.0)
    source = W.clone()
    source[3] = 0.0
    if shrunk < 0:
        source[2] = -source[2]
    lost = LinearCodes(codes.codes, scales, codes.zeros, codes.widths)
    changed = restore_gain(source, lost, H)
    assert torch.isfinite(changed.scales).all()
    assert (changed.scales[:, 2] <= LARGEST_GAIN * scales[:, 2] * 1.001).all()
    assert torch.equal(changed.scales[:, 3], scales[:, 3])
