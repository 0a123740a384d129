"""Trellis codes for linears that read one input: Viterbi with GPTQ's feedback between tiles.

    for every 16 columns b, in order:  ŵ_b = the best circles for w_b,
                                       E_b = (w_b - ŵ_b) U_bb^-1,   w_k -= E_b U_bk  for k > b

a group in `bitmill_kernels.trellis.group` (arXiv 2210.17323 and, for blocks, QuIP's LDLQ, arXiv
2307.13304). Columns are rotated inside their groups before (`quant/rotation.py`), which makes
weights Gaussian, as the code wants them. Without feedback inside the 16 columns a linear of
SmolLM2-135M loses 1 to 10 % of error, mostly 2.

Rows whose errors raise the loss more get more of the bits of their tile: an error counts by its
row's importance times its scale squared (`bitmill_kernels/trellis/encode.py`).

A weight's scale is that of its row times that of its group (`solvers/trellis_scales.py`). Rows'
scales are fitted to the target before the loop, and by least squares in the metric of H after it; a
group's scale is fitted when the loop reaches it, to the weights as they are by then.

Ranks take whole rows of tiles, which are independent but for scales of groups. These follow from
sums over all rows, taken in float64 and added up over ranks, whose rounding no scale in fp16 shows.
"""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from bitmill.config.methods import GPTQ, RTN
from bitmill.quant.codes import group_slices, row_errors, row_slices
from bitmill.quant.trellis import TrellisTensor
from bitmill.results import LinearResult
from bitmill.runtime.ranks import SINGLE, Ranks
from bitmill.runtime.timer import timed
from bitmill.solvers.gptq.column_loop import solve_siblings
from bitmill.solvers.gptq.correction import Goal, goals_of
from bitmill.solvers.gptq.curvature import Curvature
from bitmill.solvers.gptq.settings import GptqSettings
from bitmill.solvers.polish import rounded_step
from bitmill.solvers.solver import Linear, Solved
from bitmill.solvers.trellis_scales import Sized, group_scales, row_scales, sizes_of, stored
from bitmill_kernels.layout import GROUP_SIZE, group_columns
from bitmill_kernels.trellis.group import Feedback, emphases, encode_group
from bitmill_kernels.trellis.layout import TILE

SUPER_BLOCK = 4
"""Groups whose errors reach the columns behind them in one product."""


@dataclass(frozen=True)
class TrellisSolver:
    """Trellis codes as a solver (`solvers/solver.py`).

    feedback: errors are compensated by later columns; needs H. refit: rows' scales are fitted again
    after the loop. ridges: of corrections, where there are shifts.
    """

    feedback: bool = True
    refit: bool = True
    ridges: tuple[float, ...] = (0.0, 0.05, 0.5)

    @classmethod
    def of_gptq(cls, settings: GPTQ) -> TrellisSolver:
        """With feedback."""
        return cls(refit=settings.scale_refit)

    @classmethod
    def of_rtn(cls, settings: RTN) -> TrellisSolver:
        """Every tile alone."""
        return cls(feedback=False, refit=False)

    def solve(self, linears: MutableSequence[Linear], H: Tensor | None, ranks: Ranks) -> Solved:
        """See `Solver`; corrections are taken out of `linears` once they are judged."""
        K = linears[0].W.shape[1]
        metric = torch.eye(K, device=linears[0].W.device) if H is None else H
        curvature = None
        goals = [Goal(linear.W, linear.W) for linear in linears]
        if self.feedback:
            assert H is not None
            corrected = any(linear.correction for linear in linears)
            ridges = self.ridges if corrected else ()
            curvature = Curvature.prepare(H, name=linears[0].name, ridges=ridges, ranks=ranks)
            goals = goals_of(linears, curvature, self.ridges, _judged, ranks)
            curvature.solvers.clear()
        linears[:] = [replace(linear, correction=None) for linear in linears]
        upper = None if curvature is None else curvature.factor.upper
        widths = [linear.widths for linear in linears]
        with timed("solve"):
            targets = [goal.target for goal in goals]
            importance = [linear.importance for linear in linears]
            found = encode_siblings(targets, upper, widths, ranks, importance)
        final = found
        if self.refit:
            with timed("polish"):
                pairs = zip(found, goals, strict=True)
                final = [refitted(codes, goal.target, metric) for codes, goal in pairs]
        with timed("report"):
            errors = [
                [
                    row_errors(goal.source - values, metric).sum()
                    for values in (0.0, before.packed_values(), after.packed_values())
                ]
                for goal, before, after in zip(goals, found, final, strict=True)
            ]
        results = [_result(one, goal, curvature) for one, goal in zip(linears, goals, strict=True)]
        return Solved(final, results, torch.stack([torch.stack(row) for row in errors]))


def _judged(
    targets: Sequence[Tensor], curvature: Curvature, widths: Sequence[tuple[int, ...]]
) -> list[Tensor]:
    """What stands for the result while corrections are compared: affine codes of a bit more, whose
    error is near that of a trellis and which take no search. Of no rows there is nothing to code.
    """
    found, some = list(targets), [i for i, W in enumerate(targets) if len(W)]
    if some:
        wider = [tuple(min(8, b + 1 + (b == 6)) for b in widths[i]) for i in some]
        quick = GptqSettings(compensated=None)
        codes = solve_siblings([targets[i] for i in some], curvature, wider, quick)
        for i, one in zip(some, codes, strict=True):
            found[i] = one.values()
    return found


def encode_siblings(
    targets: Sequence[Tensor],
    upper: Tensor | None,
    widths: Sequence[tuple[int, ...]],
    ranks: Ranks = SINGLE,
    importance: Sequence[Tensor | None] = (),
) -> list[TrellisTensor]:
    """Codes of matrices f32 [N_i, K] in packed columns, without rewrites.

    upper: U f32 [K, K] of the factor of H, None for no feedback. widths: rates of each, by group.
    ranks: those that encode other tiles of the same linears; of some this one may have none.
    importance: f32 [N_i] of each, what the squared errors of rows count; None for all in units of
    their scales, as where there are none.
    """
    filled = [functional.pad(W, (0, 0, 0, -len(W) % TILE)) for W in targets]
    rows, work = row_slices(filled), torch.cat(filled)
    inverses = None if upper is None else tile_inverses(upper)
    carried = _carried(inverses, work)
    sized = [
        Sized(sizes_of(W), own, rates)
        for W, own, rates in zip(targets, importance or [None] * len(targets), widths, strict=True)
    ]
    scales = row_scales(sized, carried, ranks)
    own_steps = [scale.float() for scale in scales]
    steps = torch.cat([whole_tiles(step) for step in own_steps])
    counts = [one.counts(step) for one, step in zip(sized, own_steps, strict=True)]
    emphasis = emphases(torch.cat([whole_tiles(one) for one in counts]))
    circles: list[list[Tensor]] = [[] for _ in targets]
    of_groups: list[list[Tensor]] = [[] for _ in targets]
    K = work.shape[1]
    error, span = torch.zeros_like(work[:, : SUPER_BLOCK * 128]), SUPER_BLOCK * 128
    for group, part in group_slices(K):
        first = part.start - part.start % span
        pending = part.start - first
        block = work[:, part]
        if upper is not None and pending:
            block = block - error[:, :pending] @ upper[first : part.start, part]
        rates = [own[group] for own in widths]
        size = sizes_of(block)
        now = [
            Sized(size[mine][: len(step)], one.importance, (rate,))
            for one, mine, step, rate in zip(sized, rows, own_steps, rates, strict=True)
        ]
        level = [stored(scale) for scale in group_scales(now, own_steps, ranks)]
        for levels, scale in zip(of_groups, level, strict=True):
            levels.append(scale[0])
        spread = [s.float().expand(m.stop - m.start) for s, m in zip(level, rows, strict=True)]
        own = None
        if upper is not None and inverses is not None:
            own = Feedback(upper[part, part], inverses[group])
        found, missed = encode_group(block, steps * torch.cat(spread), emphasis, own, rows, rates)
        for each, new in zip(circles, found, strict=True):
            each.append(new)
        if upper is None:
            continue
        error[:, pending : pending + missed.shape[1]] = missed
        last = part.stop
        if last - first == span and last < K:
            work[:, last:] -= error @ upper[first:last, last:]
    return [
        TrellisTensor.of_groups(circles[i], scales[i], torch.stack(of_groups[i]), K, widths[i])
        for i in range(len(targets))
    ]


def whole_tiles(of_rows: Tensor) -> Tensor:
    """[N] filled up by zeros to whole tiles of rows."""
    return functional.pad(of_rows, (0, -len(of_rows) % TILE))


def tile_inverses(upper: Tensor) -> list[Tensor]:
    """U_bb^-1 f32 [tile columns, 16, 16] of every group; where a tile is filled up, ones."""
    filled = functional.pad(upper, (0, -len(upper) % TILE, 0, -len(upper) % TILE))
    filled.diagonal()[len(upper) :] = 1.0
    own = torch.arange(len(filled) // TILE, device=upper.device)
    blocks = filled.view(len(own), TILE, -1, TILE)[own, :, own]
    eye = torch.eye(TILE, device=upper.device).expand_as(blocks)
    inverse = torch.linalg.solve_triangular(blocks, eye, upper=True)
    return list(inverse.split(GROUP_SIZE // TILE))


def tile_losses(inverses: Sequence[Tensor], K: int) -> Tensor:
    """|U_bb^-1|^2 of the columns of every tile, f32 [tile columns], those that fill it left out."""
    squares = torch.cat(list(inverses)).square()
    squares[-1, (K - 1) % TILE + 1 :] = 0.0
    return squares.sum((1, 2))


def _carried(inverses: Sequence[Tensor] | None, W: Tensor) -> Tensor:
    """f32 [G], what a mean squared error in a group of columns of W [N, K] counts: |U_bb^-1|^2 of
    its tiles, which is the number of its columns where there is no feedback."""
    if inverses is None:
        return torch.tensor(group_columns(W.shape[1]), dtype=W.dtype, device=W.device)
    losses = tile_losses(inverses, W.shape[1]).split(GROUP_SIZE // TILE)
    return torch.stack([own.sum() for own in losses])


def refitted(codes: TrellisTensor, target: Tensor, H: Tensor) -> TrellisTensor:
    """The same codes with row scales of least tr(R H R^T), R = target - ŵ, target f32 [N, K]."""
    scale = codes.row_scales.float()
    values = replace(codes, row_scales=torch.ones_like(codes.row_scales)).packed_values()
    product = values @ H
    slope = ((target - values * scale[:, None]) * product).sum(1)
    step = rounded_step(scale, slope, (values * product).sum(1))
    return replace(codes, row_scales=(scale + step).to(torch.float16))


def _result(linear: Linear, goal: Goal, curvature: Curvature | None) -> LinearResult:
    """All but the errors."""
    if curvature is None:
        return linear.result()
    factor, notes = curvature.factor, []
    if factor.failed:
        notes.append(f"factorization failed at dampings {list(factor.failed)}")
    if factor.dead:
        notes.append(f"{factor.dead} dead input columns")
    found = {"damping": factor.damping, "asymmetric": goal.ridge is not None}
    return linear.result().model_copy(update={**found, "notes": tuple(notes)})
