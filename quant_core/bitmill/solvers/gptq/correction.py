"""The correction of a linear's target for the already quantized prefix.

With X the inputs after the quantized prefix and X' those of the source model,

    W* = W + W (X' - X)^T X (X^T X)^-1

makes X W*^T closest to X' W^T (the least-squares reading of arXiv 2505.11695, Qronos, section 3,
and of arXiv 2504.02692, GPTAQ). A correction is kept only where the error of a sample of rows on
held-out tokens falls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from bitmill.runtime.ranks import Ranks
from bitmill.solvers.gptq.curvature import Curvature
from bitmill.solvers.solver import Correction, Linear

Quick = Callable[[Sequence[Tensor], Curvature, Sequence[tuple[int, ...]]], Sequence[Tensor]]
"""Values ŵ f32 [M, K] that stand for a solver's own: of targets f32 [M, K] and widths of each."""


@dataclass(frozen=True, eq=False)
class Goal:
    """Where a linear is going, f32 [N, K].

    ridge: damping that its correction was solved with, 0 for the factor's own; None where the
    target is the source.
    """

    source: Tensor
    target: Tensor
    ridge: float | None = None


def goals_of(
    linears: Sequence[Linear],
    curvature: Curvature,
    ridges: Sequence[float],
    quick: Quick,
    ranks: Ranks,
) -> list[Goal]:
    """The linears' own weights, or what corrections that win, judged by `quick`, move them to."""
    goals = [Goal(linear.W, linear.W) for linear in linears]
    corrected = {i: linear.correction for i, linear in enumerate(linears) if linear.correction}
    if not corrected:
        return goals
    samples = {i: linears[i].W[move.sample] for i, move in corrected.items()}
    best = _best_ridges(corrected, samples, curvature, ridges, ranks)
    for ridge in curvature.solvers.keys() - {ridge for ridge, _ in best.values()}:
        del curvature.solvers[ridge]
    pairs = {i: (samples[i], target) for i, (_, target) in best.items()}
    widths = {i: linears[i].widths for i in pairs}
    won = _winners(corrected, pairs, widths, curvature, quick, ranks)
    for ridge in dict.fromkeys(best[i][0] for i in won):
        alike = [i for i in won if best[i][0] == ridge]
        shifts = [corrected[i].shift for i in alike]
        for i, move in zip(alike, curvature.solve_each(shifts, ridge), strict=True):
            goals[i] = Goal(linears[i].W, linears[i].W + move, ridge)
    return goals


def _best_ridges(
    corrected: Mapping[int, Correction],
    samples: Mapping[int, Tensor],
    curvature: Curvature,
    ridges: Sequence[float],
    ranks: Ranks,
) -> dict[int, tuple[float, Tensor]]:
    """Of each linear the ridge of least held-out error, with the target f32 [M, K] of its sample.

    Ridges with which H is not positive definite, whose errors are not finite, are passed over.
    """
    shifts = [move.shift[move.sample] for move in corrected.values()]
    trials = [
        (i, ridge, samples[i] + move)
        for ridge in ridges
        for i, move in zip(corrected, curvature.solve_each(shifts, ridge), strict=True)
    ]
    judged = [(corrected[i], target) for i, _, target in trials]
    best: dict[int, tuple[float, float, Tensor]] = {}
    for (i, ridge, target), error in zip(trials, _held_out(judged, ranks), strict=True):
        if isfinite(error) and (i not in best or error < best[i][0]):
            best[i] = error, ridge, target
    return {i: best[i][1:] for i in corrected if i in best}


def _winners(
    corrected: Mapping[int, Correction],
    pairs: Mapping[int, tuple[Tensor, Tensor]],
    widths: Mapping[int, tuple[int, ...]],
    curvature: Curvature,
    quick: Quick,
    ranks: Ranks,
) -> list[int]:
    """Linears whose sample has less held-out error when it is quantized towards its target.

    pairs: source and target f32 [M, K] of each sample.
    """
    both = [W for pair in pairs.values() for W in pair]
    each = [widths[i] for i in pairs for _ in range(2)]
    solved = quick(both, curvature, each) if both else []
    owners = [corrected[i] for i in pairs for _ in range(2)]
    judged = list(zip(owners, solved, strict=True))
    errors = _held_out(judged, ranks)
    plain, moved = errors[::2], errors[1::2]
    return [i for i, before, after in zip(pairs, plain, moved, strict=True) if after < before]


def _held_out(candidates: Sequence[tuple[Correction, Tensor]], ranks: Ranks) -> list[float]:
    """Held-out errors of samples f32 [M, K], of all ranks' rows."""
    if not candidates:
        return []
    errors = [correction.judge(W) for correction, W in candidates]
    return ranks.totals(torch.stack(errors))
