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
descend once more, alternating (`polish.py`); neither raises the error.

`Curvature` holds what linears that read the same input share: H in packed order and its factor.
Given H the rows are independent, so such linears are solved as one tall matrix on an accelerator
and one by one on the CPU, with the same results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from bitmill.code_descent import descend_codes
from bitmill.codes import LinearCodes, group_slices, output_error
from bitmill.compensated_grid import CompensatedSettings, fit_compensated, unit_rows
from bitmill.device_solve import solve_on_device
from bitmill.errors import NumericalError
from bitmill.grid import ClipSettings, Grid, clip_search, max_code
from bitmill.hessian import DAMPING_LADDER, Factor, damped, factor
from bitmill.packed import QuantizedWeight, undo_order
from bitmill.polish import polish_codes
from bitmill.refinement_report import LinearReport
from bitmill.row_gain import restore_gain
from bitmill.rtn import round_to_nearest
from bitmill.scale_refit import refit_scales
from bitmill.timing import stage
from bitmill_kernels.backend import resolve_backend
from bitmill_kernels.gptq import gptq_block
from bitmill_kernels.layout import GROUP_SIZE
from bitmill_kernels.split_product import split_product
from bitmill_kernels.substitution import cholesky_solve

SAMPLED_ROWS = 512
"""Rows of a linear on which strengths and ridges of its correction are compared."""


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

    ridged: Cholesky factors of H with other dampings, kept for the linears to come.
    """

    H: Tensor
    factor: Factor
    order: Tensor | None
    ridged: dict[float, Tensor] = field(default_factory=dict)

    @classmethod
    def prepare(
        cls,
        H: Tensor,
        order: Tensor | None = None,
        *,
        damping: tuple[float, ...] = DAMPING_LADDER,
        name: str = "input",
    ) -> Curvature:
        """From H in source column order. Raises NumericalError as `hessian.factor` does."""
        with stage("factor"):
            if order is not None:
                order = order.to(H.device)
                H = H[order][:, order]
            return cls(H, factor(H, ladder=damping, name=name), order)

    def packed(self, matrix: Tensor) -> Tensor:
        """The columns of matrix [*, K] moved from source to packed order."""
        return matrix if self.order is None else matrix[:, self.order]

    def unpacked(self, matrix: Tensor) -> Tensor:
        """The columns of matrix [*, K] moved from packed to source order."""
        return matrix if self.order is None else undo_order(matrix, self.order)

    def solve(self, matrix: Tensor, ridge: float = 0.0) -> Tensor:
        """matrix [*, K] times the inverse of H, damped by the factor's damping or by `ridge`."""
        with stage("factor"):
            if ridge:
                return cholesky_solve(self._lower(ridge), matrix.T).T
            U = self.factor.upper
            return split_product(split_product(matrix, U.T), U)

    def _lower(self, ridge: float) -> Tensor:
        if ridge not in self.ridged:
            self.ridged[ridge] = torch.linalg.cholesky(damped(self.H, ridge))
        return self.ridged[ridge]


@dataclass(frozen=True, eq=False)
class Correction:
    """What may move a linear's target for its prefix.

    shift: f32 [N, K], the mean (y' - y)^T x of calibration tokens
    judge: held-out error of ŵ f32 [M, K] in the given rows (i64 [M] or a slice), up to a constant
        that depends on the rows alone
    sample: rows i64 [M] on which strengths and ridges are compared
    """

    shift: Tensor
    judge: Callable[[Tensor, Tensor | slice], float]
    sample: Tensor


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
    check_weights(W, name)
    if not isinstance(H, Curvature):
        H = Curvature.prepare(H, order, damping=settings.damping, name=name)
    source = H.packed(W.to(H.H.device, torch.float32))
    goal = _Goal(source, source)
    if shift is not None and strength:
        target = source + strength * H.solve(H.packed(shift), ridge)
        goal = _Goal(source, target, strength, ridge)
    return _reach([Linear(name, W, tuple(widths))], [goal], H, settings)[0]


def quantize_siblings(
    linears: Sequence[Linear],
    curvature: Curvature,
    *,
    strengths: Sequence[float] = (1.0,),
    ridges: Sequence[float] = (0.0,),
    settings: GptqSettings | None = None,
) -> list[tuple[QuantizedWeight, LinearReport]]:
    """As `quantize_gptq`, for linears that read one input, each with its best correction or none.

    Strengths and ridges are compared as float targets on a sample of rows; the best is kept if it
    also wins against no correction after the column loop of both, on clip-searched grids, over all
    rows. The compensated search of grids, polishing and gain follow for the one kept. A large ridge
    keeps the correction to directions the calibration inputs hold much of, which few tokens call
    for.
    """
    settings = settings or GptqSettings()
    goals = []
    for linear in linears:
        check_weights(linear.W, linear.name)
        source = curvature.packed(linear.W.to(curvature.H.device, torch.float32))
        goals.append(_corrected(source, linear.correction, curvature, strengths, ridges))
    goals = _judged(linears, goals, curvature, settings)
    return _reach(linears, goals, curvature, settings)


def sampled_rows(count: int, device: torch.device) -> Tensor:
    """At most `SAMPLED_ROWS` of `count` rows, evenly spaced: i64 [M], ascending."""
    most = min(count, SAMPLED_ROWS)
    return torch.arange(most, device=device) * count // max(most, 1)


def _corrected(
    source: Tensor,
    correction: Correction | None,
    curvature: Curvature,
    strengths: Sequence[float],
    ridges: Sequence[float],
) -> _Goal:
    """The corrected target of least held-out error, were it not quantized; source f32 [N, K]."""
    if correction is None:
        return _Goal(source, source)
    rows, tried = correction.sample, {}
    shift, some = curvature.packed(correction.shift), source[rows]
    for ridge in ridges:
        move = curvature.solve(shift[rows], ridge)
        for strength in strengths:
            target = curvature.unpacked(some + strength * move)
            tried[strength, ridge] = correction.judge(target, rows)
    strength, ridge = min(tried, key=tried.__getitem__)
    target = source + strength * curvature.solve(shift, ridge)
    return _Goal(source, target, strength, ridge)


def _judged(
    linears: Sequence[Linear],
    goals: Sequence[_Goal],
    curvature: Curvature,
    settings: GptqSettings,
) -> list[_Goal]:
    """The goals whose corrections win after a quick column loop; the others go to the source."""
    quick = replace(settings, compensated=None)
    moved = [i for i, linear in enumerate(linears) if linear.correction is not None]
    both = [W for i in moved for W in (goals[i].source, goals[i].target)]
    widths = [linears[i].widths for i in moved for _ in range(2)]
    solved = iter(solve_siblings(both, curvature, widths, quick) if moved else ())
    result = []
    for linear, goal in zip(linears, goals, strict=True):
        if linear.correction is None:
            result.append(goal)
            continue
        plain, corrected = (
            linear.correction.judge(curvature.unpacked(next(solved).values()), slice(None))
            for _ in range(2)
        )
        if not corrected < plain:
            goal = _Goal(goal.source, goal.source)
        best = min(plain, corrected)
        result.append(replace(goal, held_out_error=best, held_out_symmetric=plain))
    return result


def _reach(
    linears: Sequence[Linear],
    goals: Sequence[_Goal],
    curvature: Curvature,
    settings: GptqSettings,
) -> list[tuple[QuantizedWeight, LinearReport]]:
    """Column loop and polishing towards the goals, with reports."""
    targets, widths = [goal.target for goal in goals], [linear.widths for linear in linears]
    solved = solve_siblings(targets, curvature, widths, settings)
    final = polish_siblings(targets, solved, curvature.H, settings)
    return [
        (codes.finish(curvature.order), _report(linear.name, goal, before, codes, curvature))
        for linear, goal, before, codes in zip(linears, goals, solved, final, strict=True)
    ]


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


def check_weights(W: Tensor, name: str) -> None:
    """Raises NumericalError if W [N, K] holds NaN or infinity."""
    bad = ~torch.isfinite(W)
    if bool(bad.any()):
        row, column = (int(i) for i in bad.nonzero()[0])
        raise NumericalError(
            f"{name} has {int(bad.sum())} weights that are not finite, first at row {row}, column "
            f"{column}: the source checkpoint is damaged",
            code="weights_not_finite",
            param=name,
        )


def _report(
    name: str, goal: _Goal, solved: LinearCodes, final: LinearCodes, curvature: Curvature
) -> LinearReport:
    H, source = curvature.H, goal.source
    with stage("report"):
        rounded = round_to_nearest(source, solved.widths, None, ClipSettings.min_max())
        total = output_error(source, H)
        errors = [
            output_error(source - codes.values(), H) / total if total > 0 else 0.0
            for codes in (rounded, solved, final)
        ]
    return LinearReport(
        name=name,
        method="gptq",
        rows=source.shape[0],
        columns=source.shape[1],
        widths="".join(map(str, solved.widths)),
        error_rounding=errors[0],
        error_solver=errors[1],
        error=errors[2],
        damping=curvature.factor.damping,
        failed_dampings=curvature.factor.failed,
        dead_columns=curvature.factor.dead,
        asymmetric=goal.strength,
        ridge=goal.ridge,
        held_out_error=goal.held_out_error,
        held_out_symmetric=goal.held_out_symmetric,
    )
