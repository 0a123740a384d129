"""GPTQ's column loop on an accelerator: the same steps as `gptq.solve`, in few launches.

Linears that read one input stand one below the other as one matrix, so that a group is visited once
for all of them. Weights lie columns first, [K, N], so that a group is one slab and neighbouring
threads hold neighbouring rows. A group takes four steps: the errors pending from its super-block,
the clip search, the compensated search with the loop itself, and, once per super-block, the product
that carries its errors on. Nothing waits for the device before the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitmill.codes import LinearCodes, group_slices, row_slices, stacked_largest
from bitmill.compensated_grid import CompensatedSettings
from bitmill.grid import Grid, clip_search, clip_search_groups, relative_weights, round_scale
from bitmill_kernels.layout import GROUP_SIZE
from bitmill_kernels.split_product import LOW_LEFT, grouped_parts, subtract_parts

if TYPE_CHECKING:
    from bitmill.gptq import Curvature, GptqSettings
    from bitmill_kernels.group_solve_triton import Candidates

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
    from bitmill_kernels.group_solve_triton import Scratch, diagonal_blocks, group_solve_triton

    U = curvature.factor.upper
    schur = settings.clip_weight == "schur"
    squares = U.diagonal().reciprocal().square() if schur else curvature.H.diagonal()
    weight = relative_weights(squares)
    candidates = candidates_of(settings.compensated, U.device)
    work = torch.cat([W.T for W in matrices], 1)
    (K, N), span = work.shape, settings.super_block * GROUP_SIZE
    rows = row_slices(matrices)
    largest = stacked_largest(widths, rows, U.device)
    codes = torch.empty(K, N, dtype=torch.uint8, device=U.device)
    grids: list[Grid] = []
    blocks, reciprocals = diagonal_blocks(U)
    unit_parts = _unit_parts(U)
    errors = torch.empty(3 * min(span, K), N, dtype=torch.bfloat16, device=U.device)
    scratch = Scratch.of(candidates, N)
    for group, part in group_slices(K):
        first, last = part.start - part.start % span, part.stop
        block, pending = work[part], unit_parts[3 * first : 3 * part.start, part]
        if part.start > first:
            subtract_parts(block, pending.T, errors[: len(pending)])
        top = largest[group : group + 1]
        found = clip_search_groups(block, top, weight[part], settings.clip)
        grids.append(Grid(found.scale[0], found.zero[0]))
        for mine, own in zip(rows, widths, strict=True):
            if own[group] == 1:
                values = block[:, mine].T.contiguous()
                one = clip_search(values, 1, weight[part], settings=settings.clip)
                grids[-1].scale[mine], grids[-1].zero[mine] = one
        group_solve_triton(
            block,
            blocks[group],
            reciprocals[group],
            *grids[-1],
            top[0],
            candidates,
            codes[part],
            errors[len(pending) : 3 * (last - first)],
            scratch,
        )
        if last - first == span and last < K:
            subtract_parts(work[last:], unit_parts[3 * first : 3 * last, last:].T, errors)
    scales, zeros = (torch.stack(values) for values in zip(*grids, strict=True))
    whole = Grid(round_scale(scales), zeros)
    return [
        LinearCodes(codes[:, mine].T.contiguous(), whole.scale[:, mine], whole.zero[:, mine], own)
        for mine, own in zip(rows, widths, strict=True)
    ]


def _unit_parts(U: Tensor) -> Tensor:
    """Rows of U f32 [K, K] divided by their diagonal, as parts of a left factor, bf16 [3 K, K].

    Made some rows at a time: large K leave no room for the divided rows too.
    """
    parts = torch.empty(3 * len(U), len(U), dtype=torch.bfloat16, device=U.device)
    for start in range(0, len(U), SPLIT_ROWS):
        rows = slice(start, min(start + SPLIT_ROWS, len(U)))
        unit = U[rows] / U.diagonal()[rows, None]
        grouped_parts(unit, LOW_LEFT, parts[3 * rows.start : 3 * rows.stop])
    return parts


@cache
def candidates_of(settings: CompensatedSettings | None, device: torch.device) -> Candidates:
    """The grids that `compensated_grid.fit_compensated` tries, in its order; none without it."""
    from bitmill_kernels.group_solve_triton import Candidates

    if settings is None:
        return Candidates([], [], 0, device)
    first = [(1.0, 0.0), *((scale, 0.0) for scale in settings.scales)]
    then = [(scale, float(step)) for step in settings.zero_steps for scale in settings.zero_scales]
    return Candidates(first, then, settings.least_squares, device)
