import pytest
import torch

from bitmill.errors import NumericalError
from bitmill.quant.grid import (
    ClipSettings,
    Grid,
    clip_search,
    max_code,
    nearest_codes,
    one_bit_groups,
    relative_weights,
    stored_zeros,
    values,
    weighted_errors,
)
from bitmill_kernels.reference import real_zeros

WIDTHS = (1, 2, 3, 4, 6, 8)


def weights(N=24, C=128, seed=0):
    generator = torch.Generator().manual_seed(seed)
    W = 0.05 * torch.randn(N, C, generator=generator) * (1 + torch.rand(N, 1, generator=generator))
    W[:, :3] *= 6
    h = torch.rand(C, generator=generator) ** 3 + 0.01
    return W, h


def error_of(W, grid, width, h):
    """Row errors computed code by code, in fp64, from the nearest of all 2^b levels."""
    levels = torch.arange(max_code(width) + 1, dtype=torch.float64)
    levels = grid.scale.double()[:, None] * (levels - grid.zero.double()[:, None])
    distance = (W.double()[:, :, None] - levels[:, None, :]).square().amin(2)
    return distance @ h.double()


def assert_legal(grid, width):
    assert torch.equal(grid.scale, grid.scale.half().float())
    assert torch.isfinite(grid.scale).all()
    assert (grid.scale >= 0).all()
    steps = 8 if width == 1 else 1
    stored = grid.zero * steps
    assert torch.equal(stored, stored.round())
    assert ((stored >= 0) & (stored <= (15 if width == 1 else max_code(width)))).all()
    assert not grid.zero[grid.scale == 0].any()


@pytest.mark.parametrize("width", WIDTHS)
def test_grids_are_storable_and_never_worse_than_min_max(width):
    W, h = weights(seed=width)
    grids = [
        clip_search(W, width, h, settings=settings)
        for settings in (
            ClipSettings.min_max(),
            ClipSettings(zero_offsets=(), least_squares=0),
            ClipSettings(),
        )
    ]
    errors = [error_of(W, grid, width, h) for grid in grids]
    for grid in grids:
        assert_legal(grid, width)
        stored = stored_zeros(grid.zero[None], [width])
        assert torch.equal(real_zeros(stored, [width])[0], grid.zero)
    assert (errors[2] <= errors[1] * (1 + 1e-5)).all()
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    if width <= 3:
        assert errors[2].sum() < 0.97 * errors[1].sum() < 0.95 * errors[0].sum()


@pytest.mark.parametrize("width", WIDTHS)
def test_the_fast_error_equals_the_nearest_of_all_levels(width):
    W, h = weights(seed=width)
    grid = clip_search(W, width, h)
    fast = weighted_errors(W, Grid(grid.scale[:, None], grid.zero[:, None]), width, h)[:, 0]
    assert torch.allclose(fast.double(), error_of(W, grid, width, h), rtol=1e-4, atol=1e-9)


def test_width_1_is_as_good_as_every_split_of_the_row():
    """Independent: all 127 splits of the sorted row into two free levels, in fp64."""
    W, h = weights(N=12, seed=5)
    found = error_of(W, clip_search(W, 1, h), 1, h)
    for row, error in zip(W.double(), found, strict=True):
        ordered, index = row.sort()
        weight = h.double()[index]
        best = min(
            sum(
                (weight[part] * (ordered[part] - mean).square()).sum()
                for part in (slice(None, cut), slice(cut, None))
                for mean in [(weight[part] * ordered[part]).sum() / weight[part].sum()]
            )
            for cut in range(1, 128)
        )
        assert best <= error <= 1.03 * best


def test_width_1_passes_over_a_column_that_weighs_next_to_nothing():
    """Its part in the sums is below their rounding: a difference of sums finds no weight there,
    but a moment, and a level of 1e29."""
    W = torch.tensor([[-0.125] * 63 + [0.125] * 63 + [5.0]])
    h = torch.ones(127)
    h[-1] = 1e-9
    grid = clip_search(W, 1, h)
    assert (grid.scale[0], grid.zero[0]) == (0.25, 0.5)


def test_groups_of_width_1_searched_at_once_are_those_searched_alone():
    W, h = weights(N=20, C=300, seed=8)
    h[128:256] = 0.0
    found = one_bit_groups(W, relative_weights(h), ClipSettings())
    for group, part in enumerate((slice(0, 128), slice(128, 256), slice(256, 300))):
        alone = clip_search(W[:, part], 1, h[part])
        assert torch.equal(found.zero[group], alone.zero)
        assert torch.allclose(found.scale[group], alone.scale, rtol=2**-10)


def test_width_1_reaches_levels_on_one_side_of_zero():
    W = -torch.tensor([[0.1, 0.1, 0.1, 0.25, 0.25, 0.25]])
    grid = clip_search(W, 1)
    assert torch.allclose(values(nearest_codes(W, grid, 1), grid), W, atol=0.006)
    assert grid.zero[0] > 1


def test_columns_that_weigh_more_are_kept_better():
    W, _ = weights(seed=7)
    heavy = torch.ones(128)
    heavy[64:] = 100.0
    error = (W - values(nearest_codes(W, g := clip_search(W, 2, heavy), 2), g)).square()
    plain = (W - values(nearest_codes(W, g := clip_search(W, 2), 2), g)).square()
    assert error[:, 64:].sum() < 0.95 * plain[:, 64:].sum()
    assert plain.sum() < error.sum()


@pytest.mark.parametrize("width", WIDTHS)
def test_a_range_that_rounds_to_zero_has_scale_zero_and_code_zero(width):
    W = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    W[1], W[3] = 0.0, W[3] * 1e-9
    grid = clip_search(W, width)
    codes = nearest_codes(W, grid, width)
    for row in (1, 3):
        assert grid.scale[row] == 0
        assert grid.zero[row] == 0
        assert not codes[row].any()
    assert (grid.scale[[0, 2, 4]] > 0).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("width", [2, 3, 4])
def test_one_sided_groups_put_zero_at_an_end_of_the_range(sign, width):
    W = sign * (0.5 + torch.rand(6, 64, generator=torch.Generator().manual_seed(1)))
    grid = clip_search(W, width)
    assert_legal(grid, width)
    expected = 0 if sign > 0 else max_code(width)
    assert (grid.zero == expected).all()


def test_a_scale_beyond_fp16_is_an_error():
    W = torch.zeros(3, 16)
    W[2, 5] = 1e6
    with pytest.raises(NumericalError, match="does not fit fp16"):
        clip_search(W, 2)


def test_weights_that_are_all_zero_count_columns_alike():
    W, _ = weights(seed=3)
    zero, none = clip_search(W, 3, torch.zeros(128)), clip_search(W, 3)
    assert torch.equal(zero.scale, none.scale)
    assert torch.equal(zero.zero, none.zero)


def test_rows_do_not_depend_on_the_rows_beside_them():
    W, h = weights(N=700, C=128, seed=4)
    whole, part = clip_search(W, 3, h), clip_search(W[300:310], 3, h)
    assert torch.equal(whole.scale[300:310], part.scale)
    assert torch.equal(whole.zero[300:310], part.zero)
