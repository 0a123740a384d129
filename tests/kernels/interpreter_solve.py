"""Cases for Triton's interpreter: whole solves and costs against those of plain torch."""

import numpy as np
import pytest
import torch

from bitmill.quant.codes import output_error
from bitmill.quant.grid import ClipSettings
from bitmill.runtime.ranks import SINGLE
from bitmill.sensitivity.fisher import SensitivitySettings, linear_costs
from bitmill.solvers.gptq import column_loop
from bitmill.solvers.gptq import column_loop_device as device_solve
from bitmill.solvers.gptq.column_loop import solve, solve_siblings
from bitmill.solvers.gptq.correction import Correction, Linear, goals_of
from bitmill.solvers.gptq.curvature import Curvature
from bitmill.solvers.gptq.settings import GptqSettings
from bitmill.solvers.gptq.solve import GptqSolver
from bitmill.solvers.grid_search import CompensatedSettings
from bitmill.solvers.polish import polish_codes
from bitmill.solvers.rtn import round_to_nearest

CLIP = ClipSettings(shrinks=4, zero_offsets=(1,), zero_scales=(0.9, 1.0), least_squares=1)
SEARCH = CompensatedSettings(scales=(0.9,), zero_steps=(1,), zero_scales=(1.0,), least_squares=1)
SCALES = CompensatedSettings(scales=(0.9, 1.1), zero_steps=(), least_squares=0)


def made(K):
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(2 * K, K, generator=generator) @ torch.randn(K, K, generator=generator)
    W = torch.randn(11, K, generator=generator)
    W[2] = 0.0
    return W, Curvature.prepare(x.T @ x / len(x))


@pytest.fixture
def linear():
    """Two super blocks, the first of two groups."""
    return made(300)


@pytest.fixture
def narrow(monkeypatch):
    """Two super blocks of a group each; a launch takes as long as it has columns."""
    for module in (column_loop, device_solve):
        monkeypatch.setattr(module, "SUPER_BLOCK", 1)
    return made(172)


def both(monkeypatch, call):
    """Results of plain torch and of Triton."""
    found = []
    for backend in ("reference", "triton"):
        monkeypatch.setenv("BITMILL_BACKEND", backend)
        found.append(call())
    return found


@pytest.fixture(autouse=True)
def small_super_blocks(monkeypatch):
    """So that matrices small enough for the interpreter have several."""
    for module in (column_loop, device_solve):
        monkeypatch.setattr(module, "SUPER_BLOCK", 2)


def polished(matrices, codes, H, sweeps=1):
    return polish_codes(matrices, matrices, codes, H, sweeps=sweeps)[0]


@pytest.mark.parametrize(
    ("widths", "compensated"),
    [
        ((3, 2, 1), SEARCH),
        ((4, 8, 2), None),
        ((2, 0, 4), SCALES),
        ((0, 3, 0), SEARCH),
    ],
)
def test_solving_and_polishing_reach_the_plain_error(linear, monkeypatch, widths, compensated):
    W, curvature = linear
    settings = GptqSettings(clip=CLIP, compensated=compensated)
    target = W

    def run():
        codes = solve(target, curvature, widths, settings)
        return [codes, *polished([target], [codes], curvature.H)]

    for plain, fast in zip(*both(monkeypatch, run), strict=True):
        errors = [output_error(target - c.values(), curvature.H) for c in (plain, fast)]
        assert errors[1] == pytest.approx(errors[0], rel=0.01)
        assert (plain.codes == fast.codes).float().mean() >= 0.95
        assert torch.equal(fast.scales, fast.scales.half().float())
        assert not fast.values()[2].any()


def test_only_the_upper_triangle_of_the_factor_is_read(linear, monkeypatch):
    monkeypatch.setenv("BITMILL_BACKEND", "triton")
    W, curvature = linear
    settings = GptqSettings(clip=CLIP, compensated=None)
    expected = solve(W, curvature, (3, 2, 4), settings)
    monkeypatch.setattr(device_solve, "SPLIT_ROWS", 128)
    whole = device_solve._unit_parts

    def poisoned(U):
        parts = whole(U)
        for start in (128, 256):
            parts[3 * start :, :start] = float("nan")
        return parts

    monkeypatch.setattr(device_solve, "_unit_parts", poisoned)
    found = solve(W, curvature, (3, 2, 4), settings)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scales, expected.scales)


def test_siblings_are_solved_as_each_alone(narrow, monkeypatch):
    monkeypatch.setenv("BITMILL_BACKEND", "triton")
    W, curvature = narrow
    settings = GptqSettings(clip=CLIP, compensated=SCALES, rounds=1)
    widths = [(3, 2), (1, 4)]
    matrices = [W[:4], W[4:]]
    together = solve_siblings(matrices, curvature, widths, settings)
    after = polished(matrices, together, curvature.H)
    for i, matrix in enumerate(matrices):
        alone = solve(matrix, curvature, widths[i], settings)
        [own] = polished([matrix], [alone], curvature.H)
        for one, two in ((alone, together[i]), (own, after[i])):
            assert torch.equal(one.codes, two.codes)
            assert torch.equal(one.scales, two.scales)
            assert torch.equal(one.zeros, two.zeros)
            assert two.widths == widths[i]


def test_corrections_of_siblings_are_those_of_each_alone(narrow, monkeypatch):
    """One is moved with a ridge, one without, one stays."""
    monkeypatch.setenv("BITMILL_BACKEND", "triton")
    W, prepared = narrow
    H = prepared.H
    settings = GptqSettings(clip=CLIP, compensated=None, rounds=1)
    ridges = (0.0, 0.5)

    def corrected(name, rows, gain, ridge):
        some = W[rows]
        shift = 0.2 * some @ H
        move = prepared.solve(shift, ridge)
        sample = torch.arange(0, len(some), 2)
        target = (some + gain * move)[sample]

        def judge(candidate):
            R = candidate - target
            return ((R @ H) * R).sum(dtype=torch.float64)

        return Linear(name, some, (6, 8), Correction(shift, sample, judge))

    def solved(linears):
        return GptqSolver(settings, ridges).solve_with(linears, prepared, SINGLE).read(SINGLE)

    linears = [
        corrected("q", slice(0, 4), 1.0, 0.0),
        corrected("k", slice(4, 8), 1.0, 0.5),
        corrected("v", slice(8, 11), 0.0, 0.0),
    ]
    together = solved(list(linears))
    assert [result.asymmetric for _, result in together] == [True, True, False]
    goals = goals_of(linears, prepared, ridges, GptqSolver(settings).quick, SINGLE)
    assert [goal.ridge for goal in goals] == [0.0, 0.5, None]
    for one, (weight, result) in zip(linears, together, strict=True):
        [(alone, expected)] = solved([one])
        assert torch.equal(alone.codes, weight.codes)
        assert torch.equal(alone.scales, weight.scales)
        assert result.relative_error == pytest.approx(expected.relative_error, rel=1e-4)


def test_errors_around_polishing_are_those_of_the_codes(narrow, monkeypatch):
    """Towards a source that is the target of one linear and not of the other."""
    monkeypatch.setenv("BITMILL_BACKEND", "triton")
    W, curvature = narrow
    settings = GptqSettings(clip=CLIP, compensated=None)
    widths, H = [(3, 2), (2, 8)], curvature.H
    matrices = [W[:4], W[4:]]
    sources = [matrices[0], matrices[1] + 0.1 * torch.randn(7, 172)]
    codes = solve_siblings(matrices, curvature, widths, settings)
    after, errors = polish_codes(matrices, sources, codes, H, sweeps=2)
    for when, found in zip((codes, after), errors, strict=True):
        for source, own, error in zip(sources, when, found, strict=True):
            assert float(error) == pytest.approx(output_error(source - own.values(), H), rel=1e-3)
    assert float(errors[1, 0]) < float(errors[0, 0])
    for one, two in zip(after, polished(matrices, codes, H, sweeps=2), strict=True):
        assert torch.equal(one.codes, two.codes)
        assert torch.equal(one.scales, two.scales)


def test_rounding_gives_the_plain_codes(linear, monkeypatch):
    W, curvature = linear
    plain, fast = both(
        monkeypatch, lambda: round_to_nearest(W, (2, 1, 6), curvature.H.diagonal(), CLIP)
    )
    assert (plain.codes == fast.codes).float().mean() >= 0.98
    assert (plain.scales == fast.scales).float().mean() >= 0.9


def test_costs_are_the_plain_ones(linear, monkeypatch):
    W, curvature = linear
    weight = torch.rand(len(W), dtype=torch.float64) + 0.1
    settings = SensitivitySettings(widths=(1, 2, 4), rows=8)
    plain, fast = both(monkeypatch, lambda: linear_costs(W, weight, curvature, settings))
    assert plain.shape == fast.shape == (3, 3)
    assert np.allclose(plain, fast, rtol=0.01)
