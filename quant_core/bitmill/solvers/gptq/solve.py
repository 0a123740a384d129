"""GPTQ on groups of 128 columns, each group with its own bit width.

    correction of the target (`correction.py`) -> column loop (`column_loop.py`) -> polish

After the loop, scales are refitted and codes descend once more (`solvers/polish.py`), which never
raises the error. Linears that read the same input share a `Curvature` (`curvature.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, MutableSequence, Sequence
from dataclasses import dataclass, replace
from math import nan

import torch
from torch import Tensor

from bitmill.config.bit_width_map import LinearShape, code_bits
from bitmill.errors import NumericalError
from bitmill.quant.codes import row_errors
from bitmill.quant.tensors import QuantizedWeight
from bitmill.results import LinearResult
from bitmill.runtime.ranks import SINGLE, Group
from bitmill.runtime.stage_timer import stage
from bitmill.solvers.gptq.column_loop import solve_siblings
from bitmill.solvers.gptq.correction import Goal, Linear, goals_of
from bitmill.solvers.gptq.curvature import Curvature
from bitmill.solvers.gptq.settings import GptqSettings
from bitmill.solvers.polish import polish_codes


def quantize_gptq(
    W: Tensor,
    H: Tensor | Curvature,
    widths: Sequence[int],
    *,
    order: Tensor | None = None,
    settings: GptqSettings | None = None,
    shift: Tensor | None = None,
    ridge: float = 0.0,
    name: str = "linear",
) -> tuple[QuantizedWeight, LinearResult]:
    """Codes, grids and result of one linear.

    W f32 [N, K] and H f32 [K, K] in source column order (or a shared Curvature, which then brings
    the order); widths: one per group of packed columns; order i64 [K]: packed column k is source
    column order[k]. shift f32 [N, K]: the asymmetric correction's mean (y' - y)^T x, what the
    linear's outputs lack on its own inputs (W (X' - X)^T X for its prefix), solved with damping
    `ridge` (0: that of the factor).

    Raises NumericalError for weights that are not finite or a Hessian that cannot be factored.
    """
    settings = settings or GptqSettings()
    check_weights({name: W})
    if not isinstance(H, Curvature):
        H = Curvature.prepare(H, order, damping=settings.damping, name=name)
    source = H.packed(W.to(H.H.device, torch.float32))
    goal = Goal(source, source)
    if shift is not None:
        target = source + H.solve(H.packed(shift), ridge)
        if not bool(torch.isfinite(target).all()):
            raise NumericalError(
                f"the correction of {name} is not finite: its Hessian is not positive definite "
                f"with a ridge of {ridge:.1%}, or its shift is not finite; use a larger ridge",
                code="correction_not_finite",
                param=name,
            )
        goal = Goal(source, target, ridge)
    return _reach([Linear(name, W, tuple(widths))], [goal], H, settings).read(SINGLE)[0]


@dataclass(frozen=True, eq=False)
class Solved:
    """Linears that read one input, whose errors are still on the device.

    results: their errors are NaN; errors: f64 [L, 3], of zeros, before and after polishing, of this
    rank's rows
    """

    weights: Sequence[QuantizedWeight]
    results: Sequence[LinearResult]
    errors: Tensor

    def read(self, ranks: Group) -> list[tuple[QuantizedWeight, LinearResult]]:
        """Weights and whole results; waits for the device."""
        return list(zip(self.weights, read_results([self], ranks), strict=True))


def read_results(solved: Sequence[Solved], ranks: Group) -> list[LinearResult]:
    """Results of all linears in turn, with errors of all ranks' rows.

    Waits for the device, and for all ranks, once.
    """
    if not solved:
        return []
    totals = iter(ranks.totals(torch.cat([one.errors.flatten() for one in solved])))
    results = []
    for result in (result for one in solved for result in one.results):
        total = next(totals) or 1.0
        before, after = next(totals) / total, next(totals) / total
        gain = 1.0 - after / before if before > 0 else 0.0
        results.append(
            result.model_copy(update={"relative_error": after, "scale_refit_gain": gain})
        )
    return results


def quantize_siblings(
    linears: MutableSequence[Linear],
    curvature: Curvature,
    *,
    ridges: Sequence[float] = (0.0,),
    settings: GptqSettings | None = None,
    ranks: Group = SINGLE,
) -> Solved:
    """As `quantize_gptq`, for linears that read one input, each with its best correction or none.

    Ridges are compared as float targets on a sample of rows; the best is kept if it also wins there
    against no correction after the column loop of both, on clip-searched grids. All rows then go to
    the target kept, with the compensated search of grids and polishing. A large ridge keeps the
    correction to directions the calibration inputs hold much of, which few tokens call for.

    ranks: those that solve other rows of the same linears. Errors are sums over all of them.
    Weights must be finite (`check_weights`). Corrections, which hold second moments, are taken out
    of `linears` once they are judged, and solvers out of `curvature`: the column loop needs their
    memory.
    """
    settings = settings or GptqSettings()
    device = curvature.H.device
    sources = [curvature.packed(linear.W.to(device, torch.float32)) for linear in linears]
    goals = goals_of(linears, sources, curvature, ridges, settings, ranks)
    linears[:] = [replace(linear, correction=None) for linear in linears]
    curvature.solvers.clear()
    return _reach(linears, goals, curvature, settings)


def _reach(
    linears: Sequence[Linear],
    goals: Sequence[Goal],
    curvature: Curvature,
    settings: GptqSettings,
) -> Solved:
    """Column loop and polishing towards the goals."""
    targets, widths = [goal.target for goal in goals], [linear.widths for linear in linears]
    sources = [goal.source for goal in goals]
    solved = solve_siblings(targets, curvature, widths, settings)
    final, errors = polish_codes(targets, sources, solved, curvature.H, sweeps=settings.rounds)
    with stage("report"):
        zeros = torch.stack([row_errors(W, curvature.H).sum() for W in sources])
    weights = [codes.finish(curvature.order) for codes in final]
    results = [
        _result(linear, goal, curvature) for linear, goal in zip(linears, goals, strict=True)
    ]
    return Solved(weights, results, torch.cat([zeros[None], errors]).T)


def check_weights(weights: Mapping[str, Tensor]) -> None:
    """Raises NumericalError, naming the linear, if one of matrices [N, K] holds NaN or infinity.

    Waits for the device once.
    """
    if not weights:
        return
    finite = torch.stack([torch.isfinite(W).all() for W in weights.values()]).tolist()
    for (name, W), good in zip(weights.items(), finite, strict=True):
        if good:
            continue
        bad = ~torch.isfinite(W)
        row, column = (int(i) for i in bad.nonzero()[0])
        raise NumericalError(
            f"{name} has {int(bad.sum())} weights that are not finite, first at row {row}, column "
            f"{column}: the source checkpoint is damaged",
            code="weights_not_finite",
            param=name,
        )


def _result(linear: Linear, goal: Goal, curvature: Curvature) -> LinearResult:
    """All but the errors, which `read_results` gives."""
    factor, shape = curvature.factor, LinearShape(linear.name, *linear.W.shape)
    notes = []
    if factor.failed:
        notes.append(f"factorization failed at dampings {list(factor.failed)}")
    if factor.dead:
        notes.append(f"{factor.dead} dead input columns")
    return LinearResult(
        name=linear.name,
        code_bits=code_bits([shape], {linear.name: linear.widths}),
        relative_error=nan,
        damping=factor.damping,
        asymmetric=goal.ridge is not None,
        notes=tuple(notes),
    )
