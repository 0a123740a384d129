from itertools import pairwise

import pytest
import torch

from bitmill.quant.codes import LinearCodes, group_slices, output_error
from bitmill.solvers.polish import polish_codes
from rounded import problem, row_errors


def polished(W, codes, H, sweeps):
    [found], _ = polish_codes([W], [W], [codes], H, sweeps=sweeps)
    return found


@pytest.mark.parametrize("seed", range(4))
def test_a_sweep_never_raises_the_error_of_a_row(seed):
    W, H, codes = problem(seed)
    errors = [row_errors(W, polished(W, codes, H, sweeps), H) for sweeps in range(5)]
    for before, after in pairwise(errors):
        assert (after <= before * (1 + 1e-6)).all()
    assert errors[-1].sum() < 0.75 * errors[0].sum()


def test_it_ends_where_no_single_code_can_improve():
    W, H, codes = problem(N=4)
    codes = polished(W, codes, H, sweeps=30)
    base = row_errors(W, codes, H)
    for group, part in group_slices(300):
        for column in range(part.start, part.stop, 37):
            for step in (-1, 1):
                moved = codes.codes.clone().int()
                moved[:, column] += step
                legal = (moved[:, column] >= 0) & (moved[:, column] < 2 ** codes.widths[group])
                changed = LinearCodes(
                    moved.clamp(min=0).to(torch.uint8), codes.scales, codes.zeros, codes.widths
                )
                assert (row_errors(W, changed, H) >= base * (1 - 1e-6))[legal].all()


def test_it_ends_at_the_least_squares_scales_of_its_codes():
    """Independent: all G scales of each row at once, by a fp64 solve of the normal equations."""
    W, H, codes = problem()
    found = polished(W, codes, H, sweeps=60)
    Hd = H.double()
    for row in range(W.shape[0]):
        columns = torch.zeros(3, 300, dtype=torch.float64)
        for group, part in group_slices(300):
            columns[group, part] = found.codes[row, part].double() - found.zeros[group, row]
        ideal = torch.linalg.solve(columns @ Hd @ columns.T, columns @ Hd @ W[row].double())
        assert torch.allclose(found.scales[:, row].double(), ideal, rtol=2e-3)


def test_codes_stay_in_range_scales_fp16_and_zeros_as_they_are():
    W, H, codes = problem()
    found = polished(W, codes, H, sweeps=2)
    assert torch.equal(found.scales, found.scales.half().float())
    assert (found.scales > 0).all()
    assert torch.equal(found.zeros, codes.zeros)
    assert not torch.equal(found.scales, codes.scales)
    assert not torch.equal(found.codes, codes.codes)
    for group, part in group_slices(300):
        assert int(found.codes[:, part].max()) < 2 ** codes.widths[group]


def test_a_scale_of_zero_and_one_that_wants_to_be_negative_are_left_alone():
    W, H, codes = problem()
    scales = codes.scales.clone()
    scales[0, 3] = 0.0
    against = LinearCodes(codes.codes, scales, codes.zeros, codes.widths)
    found = polished(-10 * W, against, H, sweeps=1)
    assert found.scales[0, 3] == 0
    assert (found.scales[against.scales > 0] > 0).all()


@pytest.mark.parametrize("sweeps", [0, 2])
def test_errors_are_those_against_the_sources(sweeps):
    W, H, codes = problem()
    sources = [W, W + 0.01 * torch.randn(W.shape)]
    found, errors = polish_codes([W, W], sources, [codes, codes], H, sweeps=sweeps)
    for when, row in zip(([codes, codes], found), errors.tolist(), strict=True):
        for source, own, error in zip(sources, when, row, strict=True):
            assert error == pytest.approx(output_error(source - own.values(), H), rel=1e-6)
    assert (errors[0] == errors[1]).all() == (sweeps == 0)
