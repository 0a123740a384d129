import torch

from bitmill.quant.codes import LinearCodes, group_slices
from bitmill.solvers.scale_refit import refit_scales
from rounded import problem, row_errors


def test_the_refit_never_raises_the_error_of_a_row():
    for seed in range(4):
        W, H, codes = problem(seed)
        before = row_errors(W, codes, H)
        for sweeps in (1, 2, 3):
            after = row_errors(W, refit_scales(W, codes, H, sweeps=sweeps), H)
            assert (after <= before * (1 + 1e-6)).all()
        assert after.sum() < 0.99 * before.sum()


def test_many_sweeps_reach_the_least_squares_scales():
    """Independent: all G scales of each row at once, by a fp64 solve of the normal equations."""
    W, H, codes = problem()
    refitted = refit_scales(W, codes, H, sweeps=60)
    Hd = H.double()
    for row in range(W.shape[0]):
        columns = torch.zeros(3, 300, dtype=torch.float64)
        for group, part in group_slices(300):
            columns[group, part] = codes.codes[row, part].double() - codes.zeros[group, row]
        A = columns @ Hd @ columns.T
        ideal = torch.linalg.solve(A, columns @ Hd @ W[row].double())
        assert torch.allclose(refitted.scales[:, row].double(), ideal, rtol=2e-3)


def test_scales_stay_fp16_and_codes_and_zeros_stay_frozen():
    W, H, codes = problem()
    refitted = refit_scales(W, codes, H)
    assert torch.equal(refitted.scales, refitted.scales.half().float())
    assert (refitted.scales > 0).all()
    assert torch.equal(refitted.codes, codes.codes)
    assert torch.equal(refitted.zeros, codes.zeros)
    assert not torch.equal(refitted.scales, codes.scales)


def test_a_scale_of_zero_and_one_that_wants_to_be_negative_are_left_alone():
    W, H, codes = problem()
    scales = codes.scales.clone()
    scales[0, 3] = 0.0
    against = LinearCodes(codes.codes, scales, codes.zeros, codes.widths)
    refitted = refit_scales(-10 * W, against, H, sweeps=1)
    assert refitted.scales[0, 3] == 0
    assert (refitted.scales[against.scales > 0] > 0).all()
