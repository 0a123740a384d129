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

    ridged: factors of H with other dampings, kept where several linears ask for the same.
    """

    H: Tensor
    factor: Factor
    order: Tensor | None
    ridged: dict[float, Tensor] | None = None

    @classmethod
    def prepare(
        cls,
        H: Tensor,
        order: Tensor | None = None,
        *,
        damping: tuple[float, ...] = DAMPING_LADDER,
        shared: bool = False,
        name: str = "input",
    ) -> Curvature:
        """From H in source column order; shared: between linears, which keep `ridged` then.

        Raises NumericalError as `hessian.factor` does.
        """
        with stage("factor"):
            if order is not None:
                order = order.to(H.device)
                H = H[order][:, order]
            return cls(H, factor(H, ladder=damping, name=name), order, {} if shared else None)

    def packed(self, matrix: Tensor) -> Tensor:
        """The columns of matrix [*, K] moved from source to packed order."""
        return matrix if self.order is None else matrix[:, self.order]

    def unpacked(self, matrix: Tensor) -> Tensor:
        """The columns of matrix [*, K] moved from packed to source order."""
        return matrix if self.order is None else undo_order(matrix, self.order)

    def solve(self, matrix: Tensor, ridge: float = 0.0) -> Tensor:
        """matrix [*, K] times the inverse of H, damped by the factor's damping or by `ridge`."""
        with stage("factor"):
            return self._solve(matrix, ridge)

    def _solve(self, matrix: Tensor, ridge: float) -> Tensor:
        if ridge:
            return torch.cholesky_solve(matrix.T, self._lower(ridge)).T
        U = self.factor.upper
        return (matrix @ U.T) @ U

    def _lower(self, ridge: float) -> Tensor:
        if self.ridged is not None and ridge in self.ridged:
            return self.ridged[ridge]
        lower: Tensor = torch.linalg.cholesky(damped(self.H, ridge))
        if self.ridged is not None:
            self.ridged[ridge] = lower
        return lower


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
    target = source
    if shift is not None and strength:
        target = source + strength * H.solve(H.packed(shift), ridge)
    solved = solve(target, H, tuple(widths), settings)
    final = polish(target, solved, H.H, settings)
    kept = strength if shift is not None else 0.0
    return final.finish(H.order), _report(source, solved, final, H, kept, name)


def quantize_corrected(
    W: Tensor,
    curvature: Curvature,
    widths: Sequence[int],
    shift: Tensor,
    judge: Callable[[Tensor], float],
    *,
    strengths: Sequence[float] = (1.0,),
    ridges: Sequence[float] = (0.0,),
    settings: GptqSettings | None = None,
    name: str = "linear",
) -> tuple[QuantizedWeight, LinearReport]:
    """As `quantize_gptq`, with the correction of least held-out error, or none.

    judge: held-out error of any ŵ f32 [N, K] in source column order. Strengths and ridges are
    compared as float targets; the best is kept if it also wins against no correction after the
    column loop of both, on clip-searched grids. The compensated search of grids, polishing and gain
    follow for the one kept. A large ridge keeps the correction to directions the calibration inputs
    hold much of, which few tokens call for.
    """
    settings = settings or GptqSettings()
    check_weights(W, name)
    source = curvature.packed(W.to(curvature.H.device, torch.float32))
    tried = [(strength, ridge) for ridge in ridges for strength in strengths]
    moves = {ridge: curvature.solve(curvature.packed(shift), ridge) for ridge in ridges}
    targets = [source + strength * moves[ridge] for strength, ridge in tried]
    ideal = [judge(curvature.unpacked(target)) for target in targets]
    best = min(range(len(tried)), key=ideal.__getitem__)
    quick = replace(settings, compensated=None)
    both = solve(torch.cat([source, targets[best]]), curvature, tuple(widths), quick)
    plain, moved = both.rows(slice(None, len(source))), both.rows(slice(len(source), None))
    errors = [judge(curvature.unpacked(codes.values())) for codes in (plain, moved)]
    kept = errors[1] < errors[0]
    target, solved = (targets[best], moved) if kept else (source, plain)
    if settings.compensated is not None:
        solved = solve(target, curvature, tuple(widths), settings)
    final = polish(target, solved, curvature.H, settings)
    strength, ridge = tried[best] if kept else (0.0, 0.0)
    report = replace(
        _report(source, solved, final, curvature, strength, name),
        ridge=ridge,
        held_out_error=min(errors),
        held_out_symmetric=errors[0],
    )
    return final.finish(curvature.order), report


def solve(
    W: Tensor, curvature: Curvature, widths: tuple[int, ...], settings: GptqSettings
) -> LinearCodes:
    """The column loop on W f32 [N, K] in packed order."""
    with stage("solve"):
        if resolve_backend("auto", W.device) == "triton":
            return solve_on_device(W, curvature, widths, settings)
        return _solve_torch(W, curvature, widths, settings)


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
    with stage("polish"):
        if settings.rounds and settings.refit and settings.descent:
            codes = polish_codes(W, codes, H, sweeps=settings.rounds)
        elif settings.rounds and settings.refit:
            codes = refit_scales(W, codes, H, sweeps=2 * settings.rounds)
        elif settings.rounds and settings.descent:
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
    source: Tensor,
    solved: LinearCodes,
    final: LinearCodes,
    curvature: Curvature,
    strength: float,
    name: str,
) -> LinearReport:
    H = curvature.H
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
        asymmetric=strength,
    )
