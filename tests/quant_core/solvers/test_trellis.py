import pytest
import torch

from bitmill.quant.rewrites import ColumnOrder, Rewrites
from bitmill.quant.rotation import Rotation
from bitmill.runtime.ranks import SINGLE
from bitmill.solvers.factor import factor
from bitmill.solvers.solver import Correction, Linear
from bitmill.solvers.trellis import TrellisSolver, encode_siblings, refitted
from bitmill_kernels.trellis.code import DISTORTION
from solving import quantize_gptq


def layer(N=24, K=200, T=600, seed=0):
    draw = torch.Generator().manual_seed(seed)
    mix = torch.eye(K) + 0.15 * torch.randn(K, K, generator=draw)
    energy = torch.exp(torch.randn(K, generator=draw))
    x = torch.randn(T, K, generator=draw) @ mix * energy
    return 0.05 * torch.randn(N, K, generator=draw), x.T @ x / T


def loss(W, weight, H):
    R = (W - weight.dequantize()).double()
    return float(((R @ H.double()) * R).sum())


def solve(W, H, widths, solver=None, name="x", correction=None):
    order = H.diagonal().argsort(descending=True).int()
    rewrites = Rewrites([ColumnOrder(order), Rotation()])
    linear = Linear(name, rewrites.weights(W), widths, correction)
    [(weight, result)] = (
        (solver or TrellisSolver()).solve([linear], rewrites.hessian(H), SINGLE).read(SINGLE)
    )
    return weight.rewritten(rewrites), result


@pytest.mark.parametrize("rate", [2, 3])
def test_errors_are_far_below_those_of_an_affine_grid(rate):
    W, H = layer()
    weight, result = solve(W, H, (rate, rate))
    affine, _ = quantize_gptq(W, H, (rate, rate))
    assert loss(W, weight, H) < 0.75 * loss(W, affine, H)
    relative = loss(W, weight, H) / float(((W @ H) * W).sum())
    assert result.relative_error == pytest.approx(relative, rel=1e-2)
    assert result.code_bits == rate


def test_feedback_lowers_the_error_and_refitting_too():
    W, H = layer()
    plain, _ = solve(W, H, (2, 2), TrellisSolver(feedback=False, refit=False))
    fed, _ = solve(W, H, (2, 2), TrellisSolver(refit=False))
    whole, result = solve(W, H, (2, 2))
    assert loss(W, whole, H) <= loss(W, fed, H) < 0.8 * loss(W, plain, H)
    assert result.scale_refit_gain >= 0


@pytest.mark.parametrize("N", [88, 96])
def test_rows_that_count_more_end_nearer(N):
    """What the loss loses falls, also in a last tile that is filled up by rows of no account."""
    W, H = layer(N=N)
    draw = torch.Generator().manual_seed(1)
    importance = torch.exp(2 * torch.randn(N, generator=draw))
    rewrites = Rewrites([Rotation()])
    inner, metric = rewrites.weights(W), rewrites.hessian(H)
    lost = []
    for given in (None, importance):
        linear = Linear("x", inner, (2, 3), importance=given)
        [(weight, _)] = TrellisSolver().solve([linear], metric, SINGLE).read(SINGLE)
        R = (inner - weight.packed_values()).double()
        lost.append(importance.double() @ ((R @ metric.double()) * R).sum(1))
    assert lost[1] < 0.85 * lost[0]


@pytest.mark.parametrize("rate", [2, 4])
def test_a_row_with_one_large_group_is_not_cut_off(rate):
    """Sixteen times the size of its other groups is beyond the code's largest at their scale."""
    draw = torch.Generator().manual_seed(0)
    W = torch.randn(64, 512, generator=draw)
    W[5, 128:256] *= 16
    [codes] = encode_siblings([W], None, [(rate,) * 4], importance=[torch.ones(64)])
    lost = (W - codes.packed_values()).square().mean()
    assert lost < 1.7 * DISTORTION[rate]


@pytest.mark.parametrize("rate", [3, 4])
def test_weights_far_above_all_others_are_not_taken_for_tails(rate):
    """The rotation spreads each of them evenly over its group."""
    W, _ = layer(N=64, K=512)
    W[torch.arange(0, 64, 8), torch.arange(0, 512, 64)] = 50
    inner = Rotation().weights(W)
    [codes] = encode_siblings([inner], None, [(rate,) * 4])
    lost = (inner - codes.packed_values()).square().sum()
    assert lost < 1.3 * DISTORTION[rate] * W.square().sum()


def test_siblings_of_several_rates_are_what_each_is_alone():
    W, H = layer(N=40, K=272)
    upper = torch.linalg.cholesky(torch.linalg.inv(H + H.diagonal().mean() * torch.eye(272))).mT
    parts, widths = [W[:19], W[19:35], W[35:]], [(2, 3, 2), (3, 3, 4), (2, 3, 4)]
    together = encode_siblings(parts, upper, widths)
    for part, own, found in zip(parts, widths, together, strict=True):
        [alone] = encode_siblings([part], upper, [own])
        assert found.widths == own
        assert torch.equal(alone.row_scales, found.row_scales)
        error = (found.packed_values() - alone.packed_values()).abs().amax()
        assert error < 1e-3 * float(part.abs().amax())


def test_refitted_scales_are_the_best_of_each_row():
    W, H = layer(K=128)
    [codes] = encode_siblings([W * 1.2], None, [(2,)])
    best = refitted(codes, W, H)
    least = ((W - best.packed_values()) @ H * (W - best.packed_values())).sum(1)
    for moved in (0.98, 1.02):
        R = W - best.packed_values() * moved
        assert (((R @ H) * R).sum(1) > least).all()


def test_rows_and_groups_of_zeros_stay_zero():
    """The others do not lose by them."""
    W, _ = layer(K=1024)
    W[3], W[:, 128:896] = 0, 0
    [codes] = encode_siblings([W], None, [(2,) * 8])
    values = codes.packed_values()
    assert not values[3].any()
    assert not values[:, 128:896].any()
    assert (W - values).square().sum() < 1.1 * DISTORTION[2] * W.square().sum()


def test_rows_of_zeros_take_nothing_from_the_others():
    """These get the scales that they have alone."""
    W, _ = layer(N=32, K=400)
    [alone] = encode_siblings([W], None, [(4,) * 4])
    [among] = encode_siblings([torch.cat([W, torch.zeros(368, 400)])], None, [(4,) * 4])
    assert torch.equal(among.row_scales[:32], alone.row_scales)
    assert torch.equal(among.group_scales, alone.group_scales)


def test_a_last_group_of_few_columns_counts_as_so_many():
    """Rows are not scaled for it at the others' expense."""
    W, _ = layer(N=64, K=400)
    W[::4, 384:] *= 8
    [codes] = encode_siblings([W], None, [(2,) * 4])
    lost = (W - codes.packed_values()).square().sum()
    assert lost < 1.4 * DISTORTION[2] * W.square().sum()


def test_what_inputs_are_measured_in_changes_nothing():
    """K fills no whole tile."""
    W, H = layer(K=136)
    found = []
    for unit in (1.0, 2.0**-40):
        [codes] = encode_siblings([W], factor(H * unit).upper, [(2, 2)])
        found.append(codes)
    assert torch.equal(found[0].row_scales, found[1].row_scales)
    assert torch.equal(found[0].codes, found[1].codes)


def test_a_correction_that_wins_moves_the_target():
    W, H = layer()
    order = H.diagonal().argsort(descending=True).int()
    rewrites = Rewrites([ColumnOrder(order), Rotation()])
    inner, metric = rewrites.weights(W), rewrites.hessian(H)
    wanted = inner * 1.3

    def judge(candidate):
        R = candidate - wanted
        return ((R @ metric) * R).sum(dtype=torch.float64)

    correction = Correction(0.3 * inner @ metric, torch.arange(len(W)), judge)
    weight, result = solve(W, H, (4, 4), correction=correction)
    assert result.asymmetric
    assert loss(W * 1.3, weight, H) < 0.1 * loss(W, weight, H)
