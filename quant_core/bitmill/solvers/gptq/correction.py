"""The correction of a linear's target for the already quantized prefix.

With X the inputs after the quantized prefix and X' those of the source model,

    W* = W + a W (X' - X)^T X (X^T X)^-1

makes X W*^T closest to X' W^T (the least-squares reading of arXiv 2505.11695, Qronos, section 3,
and of arXiv 2504.02692, GPTAQ); a = 0 leaves it out. A correction is kept only where the error of a
sample of rows on held-out tokens falls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isfinite

import torch
from torch import Tensor

from bitmill.runtime.ranks import Group
from bitmill.solvers.gptq.column_loop import solve_siblings
from bitmill.solvers.gptq.curvature import Curvature
from bitmill.solvers.gptq.settings import GptqSettings

SAMPLED_ROWS = 1024
"""Rows of a linear on which its corrections are compared with each other and with none."""


@dataclass(frozen=True, eq=False)
class Correction:
    """What may move a linear's target for its prefix.

    shift: f32 [N, K], the mean (y' - y)^T x of calibration tokens
    sample: rows i64 [M] on which corrections are compared
    judge: held-out error of ŵ f32 [M, K] in those rows, f64 [] on the device
    """

    shift: Tensor
    sample: Tensor
    judge: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Linear:
    """One of the linears that read one input: W f32 [N, K], in source column order; a width per
    group of packed columns."""

    name: str
    W: Tensor
    widths: tuple[int, ...]
    correction: Correction | None = None


@dataclass(frozen=True, eq=False)
class Goal:
    """Where a linear is going, f32 [N, K] in packed order, with entries of its report."""

    source: Tensor
    target: Tensor
    strength: float = 0.0
    ridge: float = 0.0
    held_out_error: float | None = None
    held_out_symmetric: float | None = None


def sampled_rows(count: int, device: torch.device, part: slice | None = None) -> Tensor:
    """Those of a sample of `count` rows that lie in `part` (None: all), i64 [M], ascending.

    The sample is at most `SAMPLED_ROWS` rows, evenly spaced.
    """
    part = part or slice(0, count)
    most = min(count, SAMPLED_ROWS)
    first, last = (-(-end * most // max(count, 1)) for end in (part.start, part.stop))
    return torch.arange(first, last, device=device) * count // max(most, 1)


@dataclass(frozen=True, eq=False)
class _Trial:
    """A correction of a linear; source and target f32 [M, K] of its sample, in packed order."""

    widths: tuple[int, ...]
    correction: Correction
    source: Tensor
    target: Tensor
    strength: float
    ridge: float


def _trials(
    linears: Sequence[Linear],
    sources: Sequence[Tensor],
    curvature: Curvature,
    strengths: Sequence[float],
    ridges: Sequence[float],
) -> list[list[_Trial]]:
    """Every correction of each linear of source f32 [N_i, K] in packed order."""
    every: list[list[_Trial]] = [[] for _ in linears]
    given = [
        (own, linear.widths, correction, source[correction.sample])
        for own, linear, source in zip(every, linears, sources, strict=True)
        if (correction := linear.correction)
    ]
    shifts = [curvature.packed(move.shift[move.sample]) for _, _, move, _ in given]
    for ridge in ridges:
        moves = curvature.solve_each(shifts, ridge)
        for (own, widths, correction, some), move in zip(given, moves, strict=True):
            for strength in strengths:
                target = some + strength * move
                own.append(_Trial(widths, correction, some, target, strength, ridge))
    return every


def goals_of(
    linears: Sequence[Linear],
    sources: Sequence[Tensor],
    curvature: Curvature,
    strengths: Sequence[float],
    ridges: Sequence[float],
    settings: GptqSettings,
    ranks: Group,
) -> list[Goal]:
    """Sources f32 [N_i, K] in packed order, or what corrections that win move them to."""
    every = _trials(linears, sources, curvature, strengths, ridges)
    trials = [trial for own in every for trial in own]
    errors = _held_out([(trial, trial.target) for trial in trials], curvature, ranks)
    error = dict(zip(trials, errors, strict=True))
    every = [[trial for trial in own if isfinite(error[trial])] for own in every]
    best = [min(own, key=error.__getitem__) for own in every if own]
    for ridge in curvature.solvers.keys() - {trial.ridge for trial in best}:
        del curvature.solvers[ridge]
    found = _verdicts(best, curvature, settings, ranks)
    moves = _moves([trial for trial, plain, corrected in found if corrected < plain], curvature)
    verdicts = iter(found)
    goals = []
    for source, own in zip(sources, every, strict=True):
        goal = Goal(source, source)
        if own:
            trial, plain, corrected = next(verdicts)
            if trial in moves:
                target = source + trial.strength * moves.pop(trial)
                goal = Goal(source, target, trial.strength, trial.ridge)
            lowest = min(plain, corrected)
            goal = replace(goal, held_out_error=lowest, held_out_symmetric=plain)
        goals.append(goal)
    return goals


def _moves(trials: Sequence[_Trial], curvature: Curvature) -> dict[_Trial, Tensor]:
    """What corrections move all rows by at strength 1, f32 [N, K] in packed order."""
    moves: dict[_Trial, Tensor] = {}
    for ridge in dict.fromkeys(trial.ridge for trial in trials):
        alike = [trial for trial in trials if trial.ridge == ridge]
        shifts = [curvature.packed(trial.correction.shift) for trial in alike]
        moves |= zip(alike, curvature.solve_each(shifts, ridge), strict=True)
    return moves


def _verdicts(
    trials: Sequence[_Trial], curvature: Curvature, settings: GptqSettings, ranks: Group
) -> list[tuple[_Trial, float, float]]:
    """Relative held-out errors of the quantized samples, without each correction and with it."""
    if not trials:
        return []
    both = [W for trial in trials for W in (trial.source, trial.target)]
    widths = [trial.widths for trial in trials for _ in range(2)]
    solved = iter(solve_siblings(both, curvature, widths, replace(settings, compensated=None)))
    candidates = []
    for trial in trials:
        for W in (torch.zeros_like(trial.source), next(solved).values(), next(solved).values()):
            candidates.append((trial, W))
    errors = iter(_held_out(candidates, curvature, ranks))
    result = []
    for trial in trials:
        whole, plain, corrected = (next(errors) for _ in range(3))
        whole = whole or 1.0
        result.append((trial, plain / whole, corrected / whole))
    return result


def _held_out(
    candidates: Sequence[tuple[_Trial, Tensor]], curvature: Curvature, ranks: Group
) -> list[float]:
    """Held-out errors of samples f32 [M, K] in packed order, of all ranks' rows."""
    if not candidates:
        return []
    errors = [trial.correction.judge(curvature.unpacked(W)) for trial, W in candidates]
    return ranks.totals(torch.stack(errors))
