"""GPTQ on groups of 128 columns, each group with its own bit width.

    H + damping = (U^T U)^-1;   for every column j:
        e_j = w_j - ŵ_j,   w_k -= e_j U_jk / U_jj  for k > j

(arXiv 2210.17323, algorithm 1). A block of the algorithm is one group, so its grid is found on
weights already compensated for every earlier column. Inside a super-block of four groups the
pending errors are applied when a group is reached; past it, by one matrix product per super-block.

Before the loop, the asymmetric correction may move the target: with X the inputs after the
quantized prefix and X' those of the source model, W* = W + a W (X' - X)^T X (X^T X)^-1 makes
X W*^T closest to X' W^T (the least-squares reading of arXiv 2505.11695, Qronos, section 3, and of
arXiv 2504.02692, GPTAQ); `a` = 0 leaves it out. After the loop, scales are refitted and codes
descend once more, alternating (`solvers/polish.py`); neither raises the error.

`Curvature` holds what linears that read the same input share: H in packed order and its factor.
Given H the rows are independent, so such linears are solved as one tall matrix on an accelerator
and one by one on the CPU, with the same results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import isfinite, nan
from typing import Literal

import torch
from torch import Tensor

from bitmill.calibration.hessian import DAMPING_LADDER, Factor, damped, factor
from bitmill.errors import NumericalError
from bitmill.quant.codes import LinearCodes, group_slices, row_errors, row_slices
from bitmill.quant.grid import ClipSettings, Grid, clip_search, max_code
from bitmill.quant.tensors import QuantizedWeight
from bitmill.refinement.report import LinearReport
from bitmill.runtime.ranks import SINGLE, Group
from bitmill.runtime.stage_timer import stage
from bitmill.solvers.code_descent import descend_codes
from bitmill.solvers.gptq.column_loop_device import solve_on_device
from bitmill.solvers.grid_search import CompensatedSettings, fit_compensated, unit_rows
from bitmill.solvers.polish import polish_codes, polish_measured
from bitmill.solvers.row_gain import restore_gain
from bitmill.solvers.rtn import round_to_nearest
from bitmill.solvers.scale_refit import refit_scales
from bitmill_kernels.backend import resolve_backend
from bitmill_kernels.gptq.block import gptq_block
from bitmill_kernels.layout import GROUP_SIZE
from bitmill_kernels.linalg.split_product import split_product
from bitmill_kernels.linalg.substitution import cholesky_solver

FACTOR_WORK = 3.0
"""Work of the factor of a Hessian and its inverse, in Cholesky factors."""

SAMPLED_ROWS = 1024
"""Rows of a linear on which its corrections are compared with each other and with none."""


@dataclass(frozen=True)
class GptqSettings:
    """Every part has a switch.

    clip_weight: columns weigh diag(H) or 1 / U_jj^2 in the clip search
    compensated: search of the grid by GPTQ's own loss after the clip search, or None
    rounds: sweeps of polishing; refit, descent: whether scales and codes take part in them
    gain: how much of each row's shrinkage is undone at the end, 0 none to 1 all
    """

    clip: ClipSettings = field(default_factory=ClipSettings)
    clip_weight: Literal["hessian", "schur"] = "hessian"
    compensated: CompensatedSettings | None = field(default_factory=CompensatedSettings)
    damping: tuple[float, ...] = DAMPING_LADDER
    super_block: int = 4
    rounds: int = 4
    refit: bool = True
    descent: bool = True
    gain: float = 0.0


@dataclass(frozen=True, eq=False)
class Curvature:
    """H f32 [K, K] in packed column order, its factor, and that order (i64 [K], None = natural).

    solvers: those of H with other dampings, by damping, while corrections are compared.
    """

    H: Tensor
    factor: Factor
    order: Tensor | None
    solvers: dict[float, Callable[[Tensor], Tensor]] = field(default_factory=dict)

    @classmethod
    def prepare(
        cls,
        H: Tensor,
        order: Tensor | None = None,
        *,
        damping: tuple[float, ...] = DAMPING_LADDER,
        name: str = "input",
        ridges: Sequence[float] = (),
        ranks: Group = SINGLE,
    ) -> Curvature:
        """From H in source column order. Raises NumericalError as `hessian.factor` does.

        ranks: those that hold this H too and will solve with these ridges. Each makes some of the
        factors for all.
        """
        with stage("factor"):
            if order is not None:
                order = order.to(H.device, non_blocking=True)
                H = H[order][:, order]
            if ranks.size == 1:
                return cls(H, factor(H, ladder=damping, name=name), order)
            found, ridged = _divided_factors(H, damping, name, ridges, ranks)
            return cls(H, found, order, {r: cholesky_solver(ridged[r]) for r in ridged})

    def packed(self, matrix: Tensor) -> Tensor:
        """The columns of matrix [*, K] moved from source to packed order."""
        return matrix if self.order is None else matrix[:, self.order]

    def unpacked(self, matrix: Tensor) -> Tensor:
        """The columns of matrix [*, K] moved from packed to source order."""
        return matrix if self.order is None else matrix.index_select(1, self._places)

    @cached_property
    def _places(self) -> Tensor:
        """The packed column of each source column, i64 [K]."""
        assert self.order is not None
        return torch.argsort(self.order)

    def solve(self, matrix: Tensor, ridge: float = 0.0) -> Tensor:
        """matrix [*, K] times the inverse of H, damped by the factor's damping or by `ridge`.

        NaN where H damped by `ridge` is not positive definite.
        """
        with stage("factor"):
            if ridge:
                if ridge not in self.solvers:
                    self.solvers[ridge] = cholesky_solver(_ridged(self.H, ridge))
                return self.solvers[ridge](matrix.T).T
            U = self.factor.upper
            return split_product(split_product(matrix, U.T), U)

    def solve_each(self, matrices: Sequence[Tensor], ridge: float = 0.0) -> list[Tensor]:
        """`solve` of matrices [N_i, K], one below the other on an accelerator."""
        if len(matrices) < 2 or resolve_backend("auto", self.H.device) != "triton":
            return [self.solve(matrix, ridge) for matrix in matrices]
        whole = self.solve(torch.cat(list(matrices)), ridge)
        return [whole[mine] for mine in row_slices(matrices)]


def _divided_factors(
    H: Tensor, ladder: tuple[float, ...], name: str, ridges: Sequence[float], ranks: Group
) -> tuple[Factor, dict[float, Tensor]]:
    """The factor of H, which the first rank makes, and those with ridges, which others make."""
    own = factor(H, ladder=ladder, name=name) if ranks.first else None
    firm = [ridge for ridge in ridges if ridge]
    _, *owners = ranks.owners([FACTOR_WORK, *(1.0 for _ in firm)])
    ridged = {}
    for ridge, owner in zip(firm, owners, strict=True):
        mine = owner == ranks.rank
        ridged[ridge] = _ridged(H, ridge) if mine else H.new_empty(H.shape).mT
    shared = ranks.broadcast(replace(own, upper=torch.empty(0)) if own else None)
    assert shared is not None
    found = replace(shared, upper=own.upper if own else H.new_empty(H.shape))
    ranks.share(found.upper, 0)
    for ridge, owner in zip(firm, owners, strict=True):
        ranks.share(ridged[ridge].mT, owner)
    return found, ridged


def _ridged(H: Tensor, ridge: float) -> Tensor:
    """The Cholesky factor f32 [K, K] of H damped by `ridge`; NaN where there is none.

    It lies columns first.
    """
    lower, info = torch.linalg.cholesky_ex(damped(H, ridge).mT)
    result: Tensor = lower.mul_(torch.where(info == 0, 1.0, torch.nan))
    return result


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
class _Goal:
    """Where a linear is going, f32 [N, K] in packed order, with entries of its report."""

    source: Tensor
    target: Tensor
    strength: float = 0.0
    ridge: float = 0.0
    held_out_error: float | None = None
    held_out_symmetric: float | None = None


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
    goal = _Goal(source, source)
    if shift is not None and strength:
        target = source + strength * H.solve(H.packed(shift), ridge)
        if not bool(torch.isfinite(target).all()):
            raise NumericalError(
                f"the correction of {name} is not finite: its Hessian is not positive definite "
                f"with a ridge of {ridge:.1%}, or its shift is not finite; use a larger ridge",
                code="correction_not_finite",
                param=name,
            )
        goal = _Goal(source, target, strength, ridge)
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
    goals = _goals(linears, sources, curvature, strengths, ridges, settings, ranks)
    linears[:] = [replace(linear, correction=None) for linear in linears]
    curvature.solvers.clear()
    return _reach(linears, goals, curvature, settings)


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


def _goals(
    linears: Sequence[Linear],
    sources: Sequence[Tensor],
    curvature: Curvature,
    strengths: Sequence[float],
    ridges: Sequence[float],
    settings: GptqSettings,
    ranks: Group,
) -> list[_Goal]:
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
        goal = _Goal(source, source)
        if own:
            trial, plain, corrected = next(verdicts)
            if trial in moves:
                target = source + trial.strength * moves.pop(trial)
                goal = _Goal(source, target, trial.strength, trial.ridge)
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


def _reach(
    linears: Sequence[Linear],
    goals: Sequence[_Goal],
    curvature: Curvature,
    settings: GptqSettings,
) -> Solved:
    """Column loop and polishing towards the goals."""
    targets, widths = [goal.target for goal in goals], [linear.widths for linear in linears]
    solved = solve_siblings(targets, curvature, widths, settings)
    sources, both = [goal.source for goal in goals], settings.refit and settings.descent
    triton = resolve_backend("auto", curvature.H.device) == "triton"
    if triton and both and settings.rounds and not settings.gain:
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


def solve(
    W: Tensor, curvature: Curvature, widths: tuple[int, ...], settings: GptqSettings
) -> LinearCodes:
    """The column loop on W f32 [N, K] in packed order."""
    return solve_siblings([W], curvature, [widths], settings)[0]


def solve_siblings(
    matrices: Sequence[Tensor],
    curvature: Curvature,
    widths: Sequence[tuple[int, ...]],
    settings: GptqSettings,
) -> list[LinearCodes]:
    """The column loop on matrices f32 [N_i, K] in packed order, each with widths of its own."""
    with stage("solve"):
        if resolve_backend("auto", curvature.H.device) == "triton":
            return solve_on_device(matrices, curvature, widths, settings)
        return [
            _solve_torch(W, curvature, own, settings)
            for W, own in zip(matrices, widths, strict=True)
        ]


def _solve_torch(
    W: Tensor, curvature: Curvature, widths: tuple[int, ...], settings: GptqSettings
) -> LinearCodes:
    work, unit = W.clone(), unit_rows(curvature.factor.upper)
    columns, span = W.shape[1], settings.super_block * GROUP_SIZE
    codes: list[Tensor] = []
    grids: list[Grid] = []
    error = torch.empty_like(W[:, :span])
    for group, part in group_slices(columns):
        first = part.start - part.start % span
        pending = part.start - first
        block = work[:, part]
        if pending:
            block = block - error[:, :pending] @ unit[first : part.start, part]
        block = block.contiguous()
        grid = fit_grid(block, widths[group], curvature, part, settings)
        code, missed = gptq_block(
            block, unit[part, part].contiguous(), grid.scale, grid.zero, max_code(widths[group])
        )
        codes.append(code)
        grids.append(grid)
        error[:, pending : pending + missed.shape[1]] = missed
        last = part.stop
        if last - first == span and last < columns:
            work[:, last:] -= error @ unit[first:last, last:]
    return LinearCodes.join(codes, grids, widths)


def fit_grid(
    block: Tensor, width: int, curvature: Curvature, part: slice, settings: GptqSettings
) -> Grid:
    """The grid of one group from its compensated weights f32 [N, c]."""
    U = curvature.factor.upper[part, part].contiguous()
    if settings.clip_weight == "schur":
        weight = U.diagonal().square().reciprocal()
    else:
        weight = curvature.H.diagonal()[part]
    grid = clip_search(block, width, weight, settings=settings.clip)
    if settings.compensated is None:
        return grid
    return fit_compensated(block, width, U, grid, settings.compensated)


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
    """Sweeps of one kind alone, where only one is wanted, and the gain."""
    if settings.rounds and settings.refit and not settings.descent:
        codes = refit_scales(W, codes, H, sweeps=2 * settings.rounds)
    elif settings.rounds and settings.descent and not settings.refit:
        codes = descend_codes(W, codes, H, sweeps=settings.rounds)
    return restore_gain(W, codes, H, strength=settings.gain) if settings.gain else codes


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


def _report(linear: Linear, goal: _Goal, curvature: Curvature) -> LinearReport:
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
