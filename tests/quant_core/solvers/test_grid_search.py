import pytest
import torch

from bitmill.quant.grid import ClipSettings, Grid, clip_search, max_code
from bitmill.solvers.factor import factor
from bitmill.solvers.grid_search import CompensatedSettings, compensated_loss, fit_compensated


def problem(seed=0, C=64):
    """Weights of one group, and the group's block of the factor of a larger H."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(160) + 0.3 * torch.randn(160, 160, generator=generator)
    x = torch.randn(600, 160, generator=generator) @ mix
    H = x.T @ x / 600
    W = 0.05 * torch.randn(9, C, generator=generator)
    return W, H, factor(H).upper[32 : 32 + C, 32 : 32 + C].contiguous()


def loss_of(W, grid, width, U):
    return compensated_loss(W, Grid(grid.scale[:, None], grid.zero[:, None]), width, U)[:, 0]


def test_the_loss_is_what_remains_after_all_later_columns_compensate():
    """Independent: the group's codes by a plain loop, later columns moved by least squares."""
    W, H, U = problem()
    grid = clip_search(W, 3, settings=ClipSettings.min_max())
    damped = (H + 0.005 * H.diagonal().mean() * torch.eye(160)).double()[32:, 32:]
    work, inverse = W.double().clone(), torch.linalg.inv(damped)
    rounded = torch.zeros_like(work)
    for j in range(64):
        code = (work[:, j] / grid.scale + grid.zero).round().clamp(0, max_code(3))
        rounded[:, j] = grid.scale * (code - grid.zero)
        error = (work[:, j] - rounded[:, j]) / inverse[0, 0]
        work[:, j + 1 :] -= error[:, None] * inverse[0, 1 : 64 - j]
        inverse = inverse[1:, 1:] - inverse[1:, :1] * inverse[:1, 1:] / inverse[0, 0]
    D = W.double() - rounded
    later = damped[:64, 64:] @ torch.linalg.inv(damped[64:, 64:]) @ damped[64:, :64]
    expected = ((D @ (damped[:64, :64] - later)) * D).sum(1)
    assert torch.allclose(loss_of(W, grid, 3, U).double(), expected, rtol=1e-3)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_the_search_lowers_the_loss_of_every_row_and_stays_storable(width):
    W, H, U = problem(seed=width)
    start = clip_search(W, width, H.diagonal()[32:96])
    found = fit_compensated(W, width, U, start, CompensatedSettings())
    before, after = loss_of(W, start, width, U), loss_of(W, found, width, U)
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.99 * before.sum()
    assert torch.equal(found.scale, found.scale.half().float())
    steps = found.zero * (8 if width == 1 else 1)
    assert torch.equal(steps, steps.round())
    assert ((steps >= 0) & (steps <= (15 if width == 1 else max_code(width)))).all()


def test_every_step_of_the_search_helps():
    W, H, U = problem(seed=7)
    start = clip_search(W, 2, H.diagonal()[32:96])
    losses = [
        float(loss_of(W, fit_compensated(W, 2, U, start, settings), 2, U).sum())
        for settings in (
            CompensatedSettings(scales=(), zero_steps=(), least_squares=0),
            CompensatedSettings(zero_steps=(), least_squares=0),
            CompensatedSettings(least_squares=0),
            CompensatedSettings(),
        )
    ]
    assert losses[0] == pytest.approx(float(loss_of(W, start, 2, U).sum()))
    assert losses[0] > losses[1] > losses[2] >= losses[3]


def test_a_row_of_zeros_keeps_scale_zero():
    W, H, U = problem()
    W[3] = 0.0
    start = clip_search(W, 3, H.diagonal()[32:96])
    found = fit_compensated(W, 3, U, start, CompensatedSettings())
    assert found.scale[3] == 0
    assert found.zero[3] == 0
