from itertools import pairwise

import torch

from bitmill.quant.codes import LinearCodes, group_slices, output_error
from bitmill.solvers.code_descent import descend_codes
from bitmill.solvers.scale_refit import refit_scales
from rounded import problem, row_errors


def test_code_descent_and_refit_alternate_downwards():
    W, H, codes = problem()
    errors = [output_error(W - codes.values(), H)]
    for _ in range(3):
        codes = refit_scales(W, codes, H)
        errors.append(output_error(W - codes.values(), H))
        codes = descend_codes(W, codes, H)
        errors.append(output_error(W - codes.values(), H))
    assert all(b <= a * (1 + 1e-5) for a, b in pairwise(errors))
    assert errors[-1] < 0.7 * errors[0]


def test_code_descent_ends_where_no_single_code_can_improve():
    W, H, codes = problem(N=4)
    codes = descend_codes(W, codes, H, sweeps=20)
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


def test_only_codes_move_and_they_stay_in_range():
    W, H, codes = problem()
    changed = descend_codes(W, codes, H)
    assert torch.equal(changed.scales, codes.scales)
    assert torch.equal(changed.zeros, codes.zeros)
    assert not torch.equal(changed.codes, codes.codes)
    for group, part in group_slices(300):
        assert int(changed.codes[:, part].max()) < 2 ** codes.widths[group]
