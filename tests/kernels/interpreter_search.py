"""Cases for Triton's interpreter: grid search and column loop; run by `test_interpreter.py`."""

import pytest
import torch

from bitmill.quant import grid as plain
from bitmill.quant.grid import (
    ClipSettings,
    Grid,
    clip_search,
    clip_search_groups,
    column_weight,
    relative_weights,
    weighted_errors,
)
from bitmill.solvers.gptq.column_loop_device import candidates_of
from bitmill.solvers.grid_search import CompensatedSettings, compensated_loss, fit_compensated
from bitmill_kernels import reference
from bitmill_kernels.gptq.clip_search_triton import clip_search_triton
from bitmill_kernels.gptq.group_solve_triton import (
    Scratch,
    diagonal_blocks,
    group_losses_triton,
    group_solve_triton,
)

CLIP = ClipSettings(shrinks=5, zero_offsets=(-1, 1), zero_scales=(0.9, 1.0, 1.1), least_squares=2)
SEARCH = CompensatedSettings(
    scales=(0.9, 1.1), zero_steps=(-1, 1), zero_scales=(0.95, 1.0), least_squares=2
)


def weights(R, C, seed):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(R, C, generator=generator) * torch.rand(R, 1, generator=generator)
    w[0] = 0.0
    w[1] = w[1].abs() + 1.0
    return w, generator


@pytest.mark.parametrize(("R", "K"), [(5, 128), (19, 100), (7, 300)])
def test_clipped_grids_are_as_good_as_those_of_the_plain_search(R, K):
    w, generator = weights(R, K, seed=R + K)
    h = torch.rand(K, generator=generator)
    widths = torch.tensor([2, 3, 8, 4])[torch.arange(-(-K // 128))]
    largest = (2.0**widths - 1)[:, None].expand(-1, R)
    scale, zero = clip_search_groups(w.T.contiguous(), largest, relative_weights(h), CLIP)
    for g, width in enumerate(widths.tolist()):
        part = slice(128 * g, min(K, 128 * g + 128))
        expected = clip_search(w[:, part], width, h[part], settings=CLIP)
        hg = column_weight(w, h[part])

        def error(found, part=part, width=width, hg=hg):
            candidates = Grid(found.scale[:, None], found.zero[:, None])
            return weighted_errors(w[:, part], candidates, width, hg)[:, 0]

        found = Grid(scale[g], zero[g])
        assert torch.allclose(error(found), error(expected), rtol=1e-4, atol=1e-9)
        same = (found.scale == expected.scale) & (found.zero == expected.zero)
        assert same.float().mean() >= 0.8
        assert found.scale[0] == 0
        assert found.zero[0] == 0


def test_dropped_groups_get_grids_of_zeros():
    w, generator = weights(9, 300, seed=1)
    largest = torch.tensor([0.0, 3.0, 0.0])[:, None].expand(-1, 9)
    weight = relative_weights(torch.rand(300, generator=generator))
    scale, zero = clip_search_groups(w.T.contiguous(), largest, weight, CLIP)
    assert not scale[[0, 2]].any()
    assert not zero[[0, 2]].any()
    assert (scale[1, 1:] > 0).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_range_beyond_fp16_is_infinite():
    w = torch.zeros(128, 2)
    w[3, 1] = 1e6
    largest = torch.full((1, 2), 3.0)
    scale, _ = clip_search_triton(w, torch.ones(128), largest, torch.ones(1), None, 0)
    assert scale[0].tolist() == [0.0, float("inf")]


def triangular(C, generator):
    U = torch.eye(C) + 0.1 * torch.randn(C, C, generator=generator).triu(1)
    return U * (0.5 + torch.rand(C, 1, generator=generator))


@pytest.mark.parametrize(("R", "C", "widths"), [(7, 128, (3, 2)), (33, 70, (1, 8))])
def test_the_search_ends_where_the_plain_one_does(R, C, widths):
    w, generator = weights(R, C, seed=R + C + widths[0])
    U = triangular(C, generator)
    unit = U / U.diagonal()[:, None]
    rows = torch.arange(R) % 2
    width = torch.tensor(widths)[rows]
    start = [clip_search(w, b, settings=ClipSettings.min_max()) for b in widths]
    scale = torch.where(rows == 0, start[0].scale, start[1].scale)
    zero = torch.where(rows == 0, start[0].zero, start[1].zero)
    scale[0] = zero[0] = 0.0
    begun = Grid(scale.clone(), zero.clone())
    codes = torch.full((C, R), 255, dtype=torch.uint8)
    candidates = candidates_of(SEARCH, torch.device("cpu"))
    scratch = Scratch.of(candidates, R)
    scratch.error.fill_(float("nan"))
    scratch.t.fill_(float("nan"))
    parts = torch.full((3 * C, R), float("nan"), dtype=torch.bfloat16)
    blocks, reciprocals = diagonal_blocks(U)
    group_solve_triton(
        w.T.contiguous(),
        blocks[0],
        reciprocals[0],
        scale,
        zero,
        2.0**width - 1,
        candidates,
        codes,
        parts,
        scratch,
    )
    error = scratch.error[0, :C]
    high, low, twin = parts.float().chunk(3)
    assert torch.equal(high, twin)
    assert torch.allclose(high + low, error, rtol=1e-4)
    assert torch.equal(scale, scale.half().float())
    for i, b in enumerate(widths):
        mine = rows == i
        part = Grid(begun.scale[mine], begun.zero[mine])
        expected = fit_compensated(w[mine], b, U, part, SEARCH)
        found = Grid(scale[mine], zero[mine])
        losses = [
            compensated_loss(w[mine], Grid(g.scale[:, None], g.zero[:, None]), b, U)[:, 0]
            for g in (found, expected)
        ]
        assert losses[0].sum() <= losses[1].sum() * 1.002
        assert torch.allclose(losses[0], losses[1], rtol=0.05, atol=1e-6)
        plain_codes, plain_error = reference.gptq_block(
            w[mine], unit, found.scale, found.zero, 2**b - 1
        )
        assert (codes.T[mine] != plain_codes).float().mean() <= 0.01
        same = (codes.T[mine] == plain_codes).all(1)
        assert same.any()
        assert torch.allclose(error.T[mine][same], plain_error[same], atol=1e-5)


def test_losses_of_all_groups_are_those_of_their_loops():
    K, R = 300, 9
    w, generator = weights(R, K, seed=4)
    U = triangular(K, generator)
    grids = [
        plain.clip_search(w[:, g : g + 128], 3, settings=ClipSettings.min_max())
        for g in range(0, K, 128)
    ]
    scale, zero = (torch.stack([grid[i] for grid in grids]) for i in (0, 1))
    largest = torch.full((1, 1), 7.0).expand_as(scale)
    found = group_losses_triton(w.T.contiguous(), U, scale, zero, largest)
    for g, grid in enumerate(grids):
        part = slice(128 * g, min(K, 128 * g + 128))
        one = Grid(grid.scale[:, None], grid.zero[:, None])
        expected = compensated_loss(w[:, part], one, 3, U[part, part])[:, 0]
        assert torch.allclose(found[g], expected, rtol=1e-3, atol=1e-6)
