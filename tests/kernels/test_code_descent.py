import pytest
import torch

from bitmill_kernels import reference
from bitmill_kernels.gptq.code_descent import descend_block


def problem(R, C, width, seed):
    """Weights, correlated H, a grid and nearest codes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * C, C, generator=generator) @ torch.randn(C, C, generator=generator)
    H = x.t() @ x / len(x)
    W = torch.randn(R, C, generator=generator)
    top = 2**width - 1
    scale = (W.amax(1) - W.amin(1)).clamp(min=0.5) / top
    zero = (-W.amin(1) / scale).round().clamp(0, top)
    codes = (W / scale[:, None] + zero[:, None]).round().clamp(0, top).to(torch.uint8)
    return W, H, scale, zero, codes


def residual(W, scale, zero, codes):
    return W - scale[:, None] * (codes.float() - zero[:, None])


@pytest.mark.parametrize("width", [1, 2, 3, 8])
@pytest.mark.parametrize(("R", "C"), [(5, 128), (1, 1), (7, 100)])
def test_the_fast_sweep_gives_the_codes_of_the_plain_one(width, R, C):
    W, H, scale, zero, codes = problem(R, C, width, seed=R + C + width)
    slope = residual(W, scale, zero, codes) @ H
    kept = slope.clone()
    new, change = descend_block(codes, slope, H, scale, 2**width - 1, backend="reference")
    plain, plain_change = reference.descend_block(
        codes, slope.double(), H.double(), scale.double(), 2**width - 1
    )
    assert torch.equal(slope, kept)
    assert (new != plain).float().mean() <= 0.002
    same = (new == plain).all(1)
    assert torch.allclose(change[same], plain_change[same].float(), atol=1e-5)


def test_a_sweep_lowers_the_output_error_of_every_row():
    W, H, scale, zero, codes = problem(24, 96, 3, seed=1)
    R = residual(W, scale, zero, codes)
    new, change = descend_block(codes, R @ H, H, scale, 7)
    after = residual(W, scale, zero, new)
    assert torch.allclose(after, R - change, atol=1e-5)
    before, now = ((r @ H * r).sum(1) for r in (R, after))
    assert (now <= before * (1 + 1e-5)).all()
    assert now.sum() < 0.8 * before.sum()


def test_dead_columns_and_rows_without_scale_keep_their_codes():
    W, H, scale, zero, codes = problem(6, 40, 2, seed=2)
    H[7], H[:, 7], scale[3] = 0.0, 0.0, 0.0
    new, change = descend_block(codes, residual(W, scale, zero, codes) @ H, H, scale, 3)
    assert torch.equal(new[3], codes[3])
    assert torch.equal(new[:, 7], codes[:, 7])
    assert not change[3].any()
    assert not change[:, 7].any()


def test_shapes_that_do_not_match_are_refused():
    _, H, scale, _, codes = problem(4, 16, 3, seed=3)
    with pytest.raises(ValueError, match="slope"):
        descend_block(codes, torch.zeros(4, 15), H, scale, 7)
