"""GPTQ on groups of 128 columns, each group with its own bit width.

    correction of the target (`correction.py`) -> column loop (`column_loop.py`) -> polish

After the loop, scales are refitted and codes descend once more, alternating (`solvers/polish.py`);
neither raises the error. Linears that read the same input share a `Curvature` (`curvature.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, MutableSequence, Sequence
from dataclasses import dataclass, replace
from math import nan

import torch
from torch import Tensor

from bitmill.errors import NumericalError
from bitmill.quant.codes import LinearCodes, row_errors
from bitmill.quant.grid import ClipSettings
from bitmill.quant.tensors import QuantizedWeight
from bitmill.results import LinearReport
from bitmill.runtime.ranks import SINGLE, Group
from bitmill.runtime.stage_timer import stage
from bitmill.solvers.code_descent import descend_codes
from bitmill.solvers.gptq.column_loop import solve_siblings
from bitmill.solvers.gptq.correction import Goal, Linear, goals_of
from bitmill.solvers.gptq.curvature import Curvature
from bitmill.solvers.gptq.settings import GptqSettings
from bitmill.solvers.polish import polish_codes, polish_measured
from bitmill.solvers.rtn import round_to_nearest
from bitmill.solvers.scale_refit import refit_scales
from bitmill_kernels.backend import resolve_backend


def quantize_gptq(
    W: Tensor,
    H: Tensor | Curvature,
    widths: Sequence[int],
    *,
    order: Tensor | None = None,
    settings: GptqSettings | None = None,
    shift: Tensor | None = None,
    strength: float = 1.0,
    ridge: float = 0.0,
    name: str = "linear",
) -> tuple[QuantizedWeight, LinearReport]:
    """Codes, grids and report of one linear.

    W f32 [N, K] and H f32 [K, K] in source column order (or a shared Curvature, which then brings
    the order); widths: one per group of packed columns; order i64 [K]: packed column k is source
    column order[k]. shift f32 [N, K]: the asymmetric correction's mean (y' - y)^T x, what the
    linear's outputs lack on its own inputs (W (X' - X)^T X for its prefix), applied with
    `strength` and solved with damping `ridge` (0: that of the factor).

    Raises NumericalError for weights that are not finite or a Hessian that cannot be factored.
    """
    settings = settings or GptqSettings()
    check_weights({name: W})
    if not isinstance(H, Curvature):
        H = Curvature.prepare(H, order, damping=settings.damping, name=name)
    source = H.packed(W.to(H.H.device, torch.float32))
    goal = Goal(source, source)
    if shift is not None and strength:
        target = source + strength * H.solve(H.packed(shift), ridge)
        if not bool(torch.isfinite(target).all()):
            raise NumericalError(
                f"the correction of {name} is not finite: its Hessian is not positive definite "
                f"with a ridge of {ridge:.1%}, or its shift is not finite; use a larger ridge",
                code="correction_not_finite",
                param=name,
            )
        goal = Goal(source, target, strength, ridge)
    return _reach([Linear(name, W, tuple(widths))], [goal], H, settings).read(SINGLE)[0]


@dataclass(frozen=True, eq=False)
class Solved:
    """Linears that read one input, whose errors are still on the device.

    reports: their errors are NaN; errors: f64 [L, 4], of zeros, of plain rounding, before and after
    polishing, of this rank's rows
    """

    weights: Sequence[QuantizedWeight]
    reports: Sequence[LinearReport]
    errors: Tensor

    def read(self, ranks: Group) -> list[tuple[QuantizedWeight, LinearReport]]:
        """Weights and whole reports; waits for the device."""
        return list(zip(self.weights, read_reports([self], ranks), strict=True))


def read_reports(solved: Sequence[Solved], ranks: Group) -> list[LinearReport]:
    """Reports of all linears in turn, with errors of all ranks' rows.

    Waits for the device, and for all ranks, once.
    """
    if not solved:
        return []
    totals = iter(ranks.totals(torch.cat([one.errors.flatten() for one in solved])))
    reports = []
    for report in (report for one in solved for report in one.reports):
        total = next(totals) or 1.0
        rounding, solver, polished = (next(totals) / total for _ in range(3))
        reports.append(
            replace(report, error_rounding=rounding, error_solver=solver, error=polished)
        )
    return reports


def quantize_siblings(
    linears: MutableSequence[Linear],
    curvature: Curvature,
    *,
    strengths: Sequence[float] = (1.0,),
    ridges: Sequence[float] = (0.0,),
    settings: GptqSettings | None = None,
    ranks: Group = SINGLE,
) -> Solved:
    """As `quantize_gptq`, for linears that read one input, each with its best correction or none.

    Strengths and ridges are compared as float targets on a sample of rows; the best is kept if it
    also wins there against no correction after the column loop of both, on clip-searched grids. All
    rows then go to the target kept, with the compensated search of grids, polishing and gain. A
    large ridge keeps the correction to directions the calibration inputs hold much of, which few
    tokens call for.

    ranks: those that solve other rows of the same linears. Errors are sums over all of them;
    held-out errors are those of the sample, relative to those of zeros in its place. Weights must
    be finite (`check_weights`). Corrections, which hold second moments, are taken out of `linears`
    once they are judged, and solvers out of `curvature`: the column loop needs their memory.
    """
    settings = settings or GptqSettings()
    device = curvature.H.device
    sources = [curvature.packed(linear.W.to(device, torch.float32)) for linear in linears]
    goals = goals_of(linears, sources, curvature, strengths, ridges, settings, ranks)
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
    solved = solve_siblings(targets, curvature, widths, settings)
    sources, both = [goal.source for goal in goals], settings.refit and settings.descent
    triton = resolve_backend("auto", curvature.H.device) == "triton"
    if triton and both and settings.rounds:
        with stage("polish"):
            final, errors = polish_measured(
                targets, sources, solved, curvature.H, sweeps=settings.rounds
            )
    else:
        final = polish_siblings(targets, solved, curvature.H, settings)
        with stage("report"):
            errors = _errors(sources * 2, [*solved, *final], curvature.H).view(2, -1)
    with stage("report"):
        floor = _floor(sources, widths, curvature.H)
    weights = [codes.finish(curvature.order) for codes in final]
    reports = [
        _report(linear, goal, curvature) for linear, goal in zip(linears, goals, strict=True)
    ]
    return Solved(weights, reports, torch.cat([floor, errors]).T)


def polish(W: Tensor, codes: LinearCodes, H: Tensor, settings: GptqSettings) -> LinearCodes:
    """Sweeps over scales and codes towards W f32 [N, K], all in packed order."""
    return polish_siblings([W], [codes], H, settings)[0]


def polish_siblings(
    matrices: Sequence[Tensor], codes: Sequence[LinearCodes], H: Tensor, settings: GptqSettings
) -> list[LinearCodes]:
    """`polish` for each of matrices f32 [N_i, K]."""
    with stage("polish"):
        if settings.rounds and settings.refit and settings.descent:
            codes = polish_codes(matrices, codes, H, sweeps=settings.rounds)
        pairs = zip(matrices, codes, strict=True)
        return [_swept(W, own, H, settings) for W, own in pairs]


def _swept(W: Tensor, codes: LinearCodes, H: Tensor, settings: GptqSettings) -> LinearCodes:
    """Sweeps of one kind alone, where only one is wanted."""
    if settings.rounds and settings.refit and not settings.descent:
        codes = refit_scales(W, codes, H, sweeps=2 * settings.rounds)
    elif settings.rounds and settings.descent and not settings.refit:
        codes = descend_codes(W, codes, H, sweeps=settings.rounds)
    return codes


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


def _floor(sources: Sequence[Tensor], widths: Sequence[tuple[int, ...]], H: Tensor) -> Tensor:
    """Errors of zeros and of plain rounding, f64 [2, L]."""
    zeros = torch.stack([row_errors(W, H).sum() for W in sources])
    plain = ClipSettings.min_max()
    rounded = [
        round_to_nearest(W, own, None, plain) for W, own in zip(sources, widths, strict=True)
    ]
    return torch.stack([zeros, _errors(sources, rounded, H)])


def _errors(sources: Sequence[Tensor], codes: Sequence[LinearCodes], H: Tensor) -> Tensor:
    """tr(R H R^T) of each linear, f64 [L], with R = source - ŵ."""
    pairs = zip(sources, codes, strict=True)
    return torch.stack([row_errors(W - own.values(), H).sum() for W, own in pairs])


def _report(linear: Linear, goal: Goal, curvature: Curvature) -> LinearReport:
    """All but the errors, which `read_reports` gives."""
    return LinearReport(
        name=linear.name,
        method="gptq",
        rows=linear.W.shape[0],
        columns=linear.W.shape[1],
        widths="".join(map(str, linear.widths)),
        error_rounding=nan,
        error_solver=nan,
        error=nan,
        damping=curvature.factor.damping,
        failed_dampings=curvature.factor.failed,
        dead_columns=curvature.factor.dead,
        asymmetric=goal.strength,
        ridge=goal.ridge,
        held_out_error=goal.held_out_error,
        held_out_symmetric=goal.held_out_symmetric,
    )
