from math import isnan

import pytest
import torch
from torch import Tensor

from bitmill.errors import NumericalError
from bitmill.quant.grid import ClipSettings, clip_search, max_code
from bitmill.runtime.ranks import SINGLE, Ranks
from bitmill.solvers.factor import activation_order
from bitmill.solvers.gptq import column_loop
from bitmill.solvers.gptq.correction import goals_of
from bitmill.solvers.gptq.curvature import Curvature
from bitmill.solvers.gptq.settings import GptqSettings
from bitmill.solvers.gptq.solve import GptqSolver
from bitmill.solvers.grid_search import CompensatedSettings
from bitmill.solvers.solver import (
    Correction,
    Linear,
    check_weights,
    read_results,
    sampled_rows,
)
from solving import quantize_gptq, quantize_rtn

PLAIN = GptqSettings(compensated=None, rounds=0)
REFINED = GptqSettings()


def layer(N=12, K=200, T=600, seed=0):
    """W f32 [N, K] and H f32 [K, K] of correlated inputs with a few strong columns."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(K) + 0.15 * torch.randn(K, K, generator=generator)
    energy = torch.exp(torch.randn(K, generator=generator))
    x = torch.randn(T, K, generator=generator) @ mix * energy
    return 0.05 * torch.randn(N, K, generator=generator), x.T @ x / T


def loss(W, weight, H):
    R = (W - weight.dequantize()).double()
    return float(((R @ H.double()) * R).sum())


def slow_gptq(W: Tensor, H: Tensor, widths, damping: float) -> Tensor:
    """Textbook GPTQ in fp64: one column at a time, the inverse of what is left of H downdated."""
    W, K = W.double().clone(), W.shape[1]
    damped = H.double() + damping * H.diagonal().double().mean() * torch.eye(K)
    inverse = torch.linalg.inv(damped)
    result = torch.zeros_like(W)
    for j in range(K):
        group = j // 128
        if j % 128 == 0:
            part = slice(j, min(j + 128, K))
            weight = H.diagonal()[part]
            grid = clip_search(W[:, part].float(), widths[group], weight)
            scale, zero = grid.scale.double(), grid.zero.double()
        code = (W[:, j] / scale + zero).round().clamp(0, max_code(widths[group]))
        result[:, j] = scale * (code - zero)
        error = (W[:, j] - result[:, j]) / inverse[0, 0]
        W[:, j + 1 :] -= error[:, None] * inverse[0, 1:]
        inverse = inverse[1:, 1:] - inverse[1:, :1] * inverse[:1, 1:] / inverse[0, 0]
    return result


def test_the_blocked_loop_agrees_with_textbook_gptq():
    W, H = layer(N=24, K=300)
    widths = (3, 2, 4)
    weight, result = quantize_gptq(W, H, widths, settings=PLAIN)
    slow = slow_gptq(W, H, widths, result.damping)
    close = torch.isclose(weight.dequantize().double(), slow, atol=1e-5)
    assert close.float().mean() > 0.97
    R = W.double() - slow
    assert loss(W, weight, H) == pytest.approx(float(((R @ H.double()) * R).sum()), rel=0.02)


def test_super_blocks_do_not_change_the_result(monkeypatch):
    W, H = layer(N=6, K=700)
    found = []
    for size in (1, 6):
        monkeypatch.setattr(column_loop, "SUPER_BLOCK", size)
        found.append(quantize_gptq(W, H, (3,) * 6, settings=GptqSettings(compensated=None))[0])
    first, last = found
    assert (first.codes == last.codes).float().mean() > 0.97
    assert loss(W, first, H) == pytest.approx(loss(W, last, H), rel=0.02)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_gptq_beats_rounding_on_correlated_inputs_and_every_part_helps(width):
    W, H = layer(seed=width)
    widths = (width,) * 2
    rounded = loss(W, quantize_rtn(W, widths, H=H)[0], H)
    losses = [
        loss(W, quantize_gptq(W, H, widths, settings=settings)[0], H)
        for settings in (
            GptqSettings(clip=ClipSettings.min_max(), compensated=None, rounds=0),
            PLAIN,
            GptqSettings(rounds=0),
            GptqSettings(rounds=1),
            REFINED,
        )
    ]
    assert losses[1] < 0.85 * rounded
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.95 * losses[1]


def test_columns_can_be_given_in_any_order():
    """Permuting the inputs and undoing it by `order` is the same problem."""
    W, H = layer()
    order = torch.randperm(200, generator=torch.Generator().manual_seed(3))
    shuffled = torch.argsort(order)
    plain, _ = quantize_gptq(W, H, (3, 2), settings=REFINED)
    moved, _ = quantize_gptq(
        W[:, shuffled], H[shuffled][:, shuffled], (3, 2), order=order, settings=REFINED
    )
    assert torch.equal(moved.codes, plain.codes)
    assert torch.equal(moved.scales, plain.scales)
    assert torch.equal(moved.order.long(), order)
    assert torch.equal(moved.dequantize()[:, order], plain.dequantize())


def test_activation_order_helps_where_columns_differ_in_energy():
    W, H = layer(N=32, seed=9)
    natural = loss(W, quantize_gptq(W, H, (2, 2))[0], H)
    ordered = loss(W, quantize_gptq(W, H, (2, 2), order=activation_order(H.diagonal()))[0], H)
    assert ordered < natural


def test_the_result_tells_what_was_stored():
    W, H = layer()
    weight, result = quantize_gptq(W, H, (3, 2), name="layers.0.q_proj")
    total = float(((W @ H) * W).sum())
    assert result.relative_error == pytest.approx(loss(W, weight, H) / total, rel=1e-3)
    before, _ = quantize_gptq(W, H, (3, 2), settings=GptqSettings(rounds=0))
    gain = 1 - loss(W, weight, H) / loss(W, before, H)
    assert gain > 0
    assert result.scale_refit_gain == pytest.approx(gain, rel=1e-3)
    assert (result.name, result.code_bits) == ("layers.0.q_proj", (3 * 128 + 2 * 72) / 200)
    assert (result.damping, result.asymmetric, result.notes) == (0.005, False, ())


def test_same_input_same_bytes():
    W, H = layer()
    one, two = (quantize_gptq(W, H, (3, 1))[0] for _ in range(2))
    assert one.codes_sha256() == two.codes_sha256()
    assert torch.equal(one.scales, two.scales)
    assert torch.equal(one.zeros, two.zeros)


def test_a_shared_curvature_is_not_changed_by_a_linear():
    W, H = layer()
    curvature = Curvature.prepare(H)
    first, _ = quantize_gptq(W, curvature, (3, 3))
    quantize_gptq(2 * W, curvature, (2, 2))
    again, _ = quantize_gptq(W, curvature, (3, 3))
    assert first.codes_sha256() == again.codes_sha256()


def test_the_asymmetric_shift_answers_to_the_source_inputs():
    """Inputs behind a quantized prefix differ from the source's: the target is y' = x' W^T."""
    generator = torch.Generator().manual_seed(0)
    W, _ = layer(N=16, K=256)
    mix = torch.randn(256, 256, generator=generator)
    source = torch.randn(1500, 256, generator=generator) @ mix
    x = source + 0.2 * source.std() * torch.randn(1500, 256, generator=generator)
    H = x.T @ x / 1500
    shift = ((source - x) @ W.T).T @ x / 1500

    def missed(weight):
        return float((source @ W.T - x @ weight.dequantize().T).square().mean())

    plain, kept = quantize_gptq(W, H, (4, 4))
    moved, changed = quantize_gptq(W, H, (4, 4), shift=shift)
    ideal = torch.linalg.lstsq(x, source @ W.T).solution.T
    floor = float((source @ W.T - x @ ideal.T).square().mean())
    assert missed(moved) < missed(plain)
    assert missed(moved) - floor < 0.5 * (missed(plain) - floor)
    assert (kept.asymmetric, changed.asymmetric) == (False, True)


def test_zero_rows_and_dead_columns_are_exact_and_harmless():
    W, H = layer()
    W[4] = 0.0
    H[:, 9], H[9] = 0.0, 0.0
    weight, result = quantize_gptq(W, H, (2, 2))
    assert not weight.dequantize()[4].any()
    assert not weight.codes[4].any()
    assert result.notes == ("1 dead input columns",)
    assert torch.isfinite(weight.dequantize()).all()


def test_later_columns_answer_for_a_dropped_group():
    W, H = layer()
    weight, result = quantize_gptq(W, H, (0, 8))
    assert not weight.dequantize()[:, :128].any()
    alone = W.clone()
    alone[:, :128] = 0
    dropped = float((((W - alone) @ H) * (W - alone)).sum())
    assert loss(W, weight, H) < 0.6 * dropped
    assert result.code_bits < 8


def test_weights_that_are_not_finite_are_refused_by_name():
    W, _ = layer()
    W[3, 7] = float("nan")
    with pytest.raises(NumericalError, match=r"layers\.1\.fc1 has 1 weights.*row 3, column 7"):
        check_weights({"layers.1.fc1": W})


@pytest.mark.parametrize("K", [1, 64, 128, 129])
def test_ragged_widths_of_input(K):
    W, H = layer(N=5, K=K)
    weight, _ = quantize_gptq(W, H, (4,) * (-(-K // 128)))
    assert weight.codes.shape == (5, K)
    assert loss(W, weight, H) < 0.02 * float(((W @ H) * W).sum())


def test_the_compensated_search_starts_from_the_clip_search_and_improves_it():
    W, H = layer(seed=2)
    one = CompensatedSettings(scales=(), zero_steps=(), least_squares=0)
    same, _ = quantize_gptq(W, H, (3, 3), settings=GptqSettings(compensated=one, rounds=0))
    plain, _ = quantize_gptq(W, H, (3, 3), settings=PLAIN)
    assert torch.equal(same.codes, plain.codes)


def chosen_ridges(linears, curvature, ridges):
    goals = goals_of(linears, curvature, ridges, GptqSolver(REFINED).quick, SINGLE)
    for goal, linear in zip(goals, linears, strict=True):
        assert goal.source is linear.W
        assert (goal.target is linear.W) == (goal.ridge is None)
    return [goal.ridge for goal in goals]


def test_the_correction_is_chosen_by_the_judge():
    """The judge wants a multiple of W, and the correction with no ridge adds a tenth of W."""
    W, H = layer()
    curvature = Curvature.prepare(H)

    def chosen(gain):
        rows = torch.arange(0, len(W), 2)

        def judge(candidate):
            R = candidate - gain * W[rows]
            return ((R @ H) * R).sum(dtype=torch.float64)

        linear = Linear("linear", W, (6, 6), Correction(0.1 * W @ H, rows, judge))
        return chosen_ridges([linear], curvature, (0.0, 1.0))[0]

    assert [chosen(gain) for gain in (0.9, 1.0, 1.06, 1.1, 1.3)] == [None, None, 1.0, 0.0, 0.0]


def test_quantized_samples_are_judged_not_float_ones():
    """A correction far below a step of the grid lowers the float error and not the codes'."""
    W, H = layer()
    curvature = Curvature.prepare(H)

    def judge(candidate):
        R = candidate - 1.00001 * W
        return ((R @ H) * R).sum(dtype=torch.float64)

    seen = []

    def watched(candidate):
        seen.append(candidate)
        return judge(candidate)

    linear = Linear("linear", W, (2, 2), Correction(1e-5 * W @ H, torch.arange(len(W)), watched))
    [ridge] = chosen_ridges([linear], curvature, (0.0,))
    assert len(seen) == 3
    target, plain, moved = (float(judge(candidate)) for candidate in seen)
    assert target < 1e-4 * plain
    assert (ridge == 0.0) == (moved < plain)


def test_a_ridge_keeps_the_correction_to_strong_directions():
    W, H = layer()
    shift = 0.1 * W @ H
    plain, firm = (quantize_gptq(W, H, (8, 8), shift=shift, ridge=ridge)[0] for ridge in (0.0, 1.0))
    moved = [(weight.dequantize() - W).norm() / W.norm() for weight in (plain, firm)]
    assert 0.09 < moved[0] < 0.11
    assert moved[1] < 0.8 * moved[0]
    strong, weak = H.diagonal().argmax(), H.diagonal().argmin()
    kept = (firm.dequantize() - W).norm(dim=0) / (plain.dequantize() - W).norm(dim=0)
    assert kept[strong] > kept[weak]


def test_a_ridge_that_leaves_no_factor_is_refused():
    W, H = layer()
    lowest = torch.linalg.eigvalsh(H.double())[0].float()
    H -= (lowest + 0.02 * H.diagonal().mean()) * torch.eye(len(H))
    curvature = Curvature.prepare(H)
    assert curvature.factor.damping == 0.05
    shift = 0.1 * W @ H

    def judge(candidate):
        return (candidate - 1.1 * W).double().square().sum()

    linear = Linear("linear", W, (8, 8), Correction(shift, torch.arange(len(W)), judge))
    chosen = [chosen_ridges([linear], curvature, ridges) for ridges in ((0.01, 0.5), (0.01,))]
    assert chosen == [[0.5], [None]]


def test_siblings_are_solved_as_each_alone():
    """One corrected by its judge, one refused, one without a correction; widths of their own."""
    W, H = layer(N=21)
    curvature = Curvature.prepare(H)

    def judged(part, gain):
        target, own = gain * W[part], W[part]

        def judge(candidate):
            R = candidate - target
            return ((R @ H) * R).sum(dtype=torch.float64)

        return Correction(0.1 * own @ H, torch.arange(len(own)), judge)

    parts = slice(0, 4), slice(4, 13), slice(13, 21)
    corrections = judged(parts[0], 1.1), judged(parts[1], 1.0), None
    linears = [
        Linear(f"linear {i}", W[parts[i]], widths, corrections[i])
        for i, widths in enumerate(((3, 2), (1, 4), (2, 1)))
    ]
    ridges = (0.0, 0.5)
    given = list(linears)
    together = GptqSolver(ridges=ridges).solve_with(given, curvature, SINGLE).read(SINGLE)
    assert [linear.correction for linear in given] == [None] * 3
    assert not curvature.solvers
    for linear, (weight, result) in zip(linears, together, strict=True):
        [(alone, expected)] = (
            GptqSolver(ridges=ridges).solve_with([linear], curvature, SINGLE).read(SINGLE)
        )
        assert alone.codes_sha256() == weight.codes_sha256()
        assert torch.equal(alone.scales, weight.scales)
        assert torch.equal(alone.zeros, weight.zeros)
        assert expected == result
    assert [result.asymmetric for _, result in together] == [True, False, False]


def test_results_of_several_inputs_are_read_at_once():
    class Counting(Ranks):
        calls = 0

        def totals(self, values):
            Counting.calls += 1
            return super().totals(values)

    W, H = layer()
    curvature, ranks = Curvature.prepare(H), Counting()
    pairs = [[Linear(f"{i}.{name}", W + i, (3, 2)) for name in "ab"] for i in range(2)]
    solved = [GptqSolver().solve_with(list(pair), curvature, ranks) for pair in pairs]
    assert Counting.calls == 0
    assert all(isnan(result.relative_error) for one in solved for result in one.results)
    results = read_results(solved, ranks)
    assert Counting.calls == 1
    for i, linear in enumerate(pairs[0] + pairs[1]):
        [(weight, expected)] = GptqSolver().solve_with([linear], curvature, SINGLE).read(SINGLE)
        assert results[i] == expected
        assert solved[i // 2].weights[i % 2].codes_sha256() == weight.codes_sha256()
    assert read_results([], ranks) == []


@pytest.mark.parametrize("count", [0, 1, 1024, 1025, 5000])
def test_sampled_rows_are_spread_evenly(count):
    rows = sampled_rows(count, torch.device("cpu"))
    assert len(rows) == min(count, 1024)
    assert torch.equal(rows, rows.unique())
    if count:
        gaps = torch.cat([rows, torch.tensor([count])]).diff()
        assert int(rows[0]) == 0
        assert int(gaps.max()) <= int(gaps.min()) + 1
    for size in (2, 3, 7):
        parts = [Ranks(rank, size).part(count) for rank in range(size)]
        own = [sampled_rows(count, torch.device("cpu"), part) for part in parts]
        assert torch.equal(torch.cat(own), rows)
        for part, mine in zip(parts, own, strict=True):
            assert ((mine >= part.start) & (mine < part.stop)).all()
