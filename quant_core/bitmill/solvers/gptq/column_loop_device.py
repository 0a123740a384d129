"""GPTQ's column loop on an accelerator: the same steps as `gptq.solve`, in few launches.

Linears that read one input stand one below the other as one matrix, so that a group is visited once
for all of them. Weights lie columns first, [K, N], so that a group is one slab and neighbouring
threads hold neighbouring rows. A group takes four steps: the errors pending from its super-block,
the clip search, the compensated search with the loop itself, and, once per super-block, the product
that carries its errors on. Nothing waits for the device before the end, so the loop of every block
is a graph's (`runtime/graphs.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitmill.quant.codes import LinearCodes, group_slices, row_slices, stacked_largest
from bitmill.quant.grid import Grid, clip_search, clip_search_groups, relative_weights, round_scale
from bitmill.runtime.graphs import replayed
from bitmill.solvers.gptq.curvature import Curvature
from bitmill.solvers.gptq.settings import SUPER_BLOCK, GptqSettings
from bitmill.solvers.grid_search import CompensatedSettings
from bitmill_kernels.layout import GROUP_SIZE
from bitmill_kernels.linalg.split_product import LOW_LEFT, grouped_parts, subtract_parts

if TYPE_CHECKING:
    from bitmill_kernels.gptq.group_solve_triton import Candidates

SPLIT_ROWS = 8 * GROUP_SIZE
"""Rows of a factor that are divided and split at once."""


def solve_on_device(
    matrices: Sequence[Tensor],
    curvature: Curvature,
    widths: Sequence[tuple[int, ...]],
    settings: GptqSettings,
) -> list[LinearCodes]:
    """The column loop on matrices f32 [N_i, K] in packed order, each with widths of its own.

    Raises NumericalError where a scale does not fit fp16.
    """
    U = curvature.factor.upper
    rows = row_slices(matrices)
    ones = tuple(
        (group, mine.start, mine.stop)
        for mine, own in zip(rows, widths, strict=True)
        for group, width in enumerate(own)
        if width == 1
    )
    given = (
        torch.cat([W.T for W in matrices], 1),
        U,
        relative_weights(curvature.H.diagonal()),
        stacked_largest(widths, rows, U.device),
    )
    if ones:
        codes, scales, zeros = _column_loop(settings, ones, *given)
    else:
        codes, scales, zeros = replayed(_column_loop, (settings, ones), given)
    scales = round_scale(scales)
    return [
        LinearCodes(codes[:, mine].T.contiguous(), scales[:, mine], zeros[:, mine], own)
        for mine, own in zip(rows, widths, strict=True)
    ]


def _column_loop(
    settings: GptqSettings,
    ones: tuple[tuple[int, int, int], ...],
    work: Tensor,
    U: Tensor,
    weights: Tensor,
    largest: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes u8 [K, N], scales and zeros f32 [G, N] of work f32 [K, N], which is used up.

    U: f32 [K, K], the factor; weights: f32 [K] of the clip search; largest: f32 [G, N] largest
    codes. ones: group, first and last row of linears whose group has width 1, which is searched by
    itself; without them nothing waits for the device.
    """
    from bitmill_kernels.gptq.group_solve_triton import Scratch, diagonal_blocks, group_solve_triton

    candidates = candidates_of(settings.compensated, U.device)
    (K, N), span = work.shape, SUPER_BLOCK * GROUP_SIZE
    codes = torch.empty(K, N, dtype=torch.uint8, device=U.device)
    grids = Grid(*torch.empty(2, len(largest), N, device=U.device))
    unit_parts = _unit_parts(U)
    errors = torch.empty(3 * min(span, K), N, dtype=torch.bfloat16, device=U.device)
    before = [errors[: 3 * start] for start in range(0, len(errors) // 3, GROUP_SIZE)]
    own_errors = errors.split(3 * GROUP_SIZE)
    scratch = Scratch.of(candidates, N)
    groups = zip(
        group_slices(K),
        work.split(GROUP_SIZE),
        weights.split(GROUP_SIZE),
        largest.unbind(),
        grids.scale.unbind(),
        grids.zero.unbind(),
        *(table.unbind() for table in diagonal_blocks(U)),
        codes.split(GROUP_SIZE),
        strict=True,
    )
    for (group, part), block, weight, top, scale, zero, unit, reciprocal, code in groups:
        place, last = group % SUPER_BLOCK, part.stop
        first = part.start - place * GROUP_SIZE
        if place:
            pending = unit_parts[3 * first : 3 * part.start, part].T
            subtract_parts(block, pending, before[place])
        clip_search_groups(block, top[None], weight, settings.clip, Grid(scale, zero))
        for start, stop in ((start, stop) for one, start, stop in ones if one == group):
            values = block[:, start:stop].T.contiguous()
            found = clip_search(values, 1, weight, settings=settings.clip)
            scale[start:stop], zero[start:stop] = found
        errors_here = own_errors[place]
        group_solve_triton(
            block, unit, reciprocal, scale, zero, top, candidates, code, errors_here, scratch
        )
        if last - first == span and last < K:
            subtract_parts(work[last:], unit_parts[3 * first : 3 * last, last:].T, errors)
    return codes, *grids


def _unit_parts(U: Tensor) -> Tensor:
    """Rows of U f32 [K, K] divided by their diagonal, as parts of a left factor, bf16 [3 K, K].

    Made some rows at a time: large K leave no room for the divided rows too. Columns left of the
    diagonal of such rows, which nobody reads, stay unwritten.
    """
    parts = torch.empty(3 * len(U), len(U), dtype=torch.bfloat16, device=U.device)
    for start in range(0, len(U), SPLIT_ROWS):
        rows = slice(start, min(start + SPLIT_ROWS, len(U)))
        unit = U[rows, start:] / U.diagonal()[rows, None]
        grouped_parts(unit, LOW_LEFT, parts[3 * start : 3 * rows.stop, start:])
    return parts


@cache
def candidates_of(settings: CompensatedSettings | None, device: torch.device) -> Candidates:
    """The grids that `compensated_grid.fit_compensated` tries, in its order; none without it."""
    from bitmill_kernels.gptq.group_solve_triton import Candidates

    if settings is None:
        return Candidates([], [], 0, device)
    first = [(1.0, 0.0), *((scale, 0.0) for scale in settings.scales)]
    then = [(scale, float(step)) for step in settings.zero_steps for scale in settings.zero_scales]
    return Candidates(first, then, settings.least_squares, device)
