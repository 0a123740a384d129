"""GPTQ's column loop on an accelerator: the same steps as `gptq.solve`, in few launches.

Weights lie columns first, [K, N], so that a group is one slab and neighbouring threads hold
neighbouring rows. A group takes four launches: the errors pending from its super-block, the clip
search, the compensated search with the loop itself, and, once per super-block, the product that
carries its errors on. Nothing waits for the device before the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitmill.codes import LinearCodes, group_slices
from bitmill.compensated_grid import CompensatedSettings, unit_rows
from bitmill.grid import (
    Grid,
    clip_search,
    clip_search_groups,
    max_code,
    relative_weights,
    round_scale,
)
from bitmill_kernels.layout import GROUP_SIZE

if TYPE_CHECKING:
    from bitmill.gptq import Curvature, GptqSettings
    from bitmill_kernels.group_solve_triton import Candidates


def solve_on_device(
    W: Tensor, curvature: Curvature, widths: tuple[int, ...], settings: GptqSettings
) -> LinearCodes:
    """The column loop on W f32 [N, K] in packed order.

    Raises NumericalError where a scale does not fit fp16.
    """
    from bitmill_kernels.group_solve_triton import group_solve_triton

    U = curvature.factor.upper
    unit, reciprocal = unit_rows(U), U.diagonal().reciprocal()
    schur = settings.clip_weight == "schur"
    weight = relative_weights(reciprocal.square() if schur else curvature.H.diagonal())
    candidates = candidates_of(settings.compensated, W.device)
    (N, K), span = W.shape, settings.super_block * GROUP_SIZE
    work = W.T.contiguous()
    if work.data_ptr() == W.data_ptr():
        work = work.clone()
    codes = torch.empty(K, N, dtype=torch.uint8, device=W.device)
    error = torch.empty(min(span, K), N, device=W.device)
    largest = torch.tensor([float(max_code(width)) for width in widths]).to(W.device)
    grids: list[Grid] = []
    for group, part in group_slices(K):
        first = part.start - part.start % span
        pending = part.start - first
        block = work[part]
        if pending:
            block = torch.addmm(block, unit[first : part.start, part].T, error[:pending], alpha=-1)
        tops = largest[group].expand(1, N)
        if widths[group] == 1:
            grid = clip_search(block.T, 1, weight[part], settings=settings.clip)
        else:
            found = clip_search_groups(block, tops, weight[part], settings.clip)
            grid = Grid(found.scale[0], found.zero[0])
        missed = error[pending : pending + len(block)]
        group_solve_triton(
            block,
            unit[part, part],
            reciprocal[part],
            *grid,
            tops[0],
            candidates,
            codes[part],
            missed,
        )
        grids.append(grid)
        last = part.stop
        if last - first == span and last < K:
            work[last:].addmm_(unit[first:last, last:].T, error, alpha=-1)
    scales = round_scale(torch.stack([grid.scale for grid in grids]))
    zeros = torch.stack([grid.zero for grid in grids])
    return LinearCodes(codes.T.contiguous(), scales, zeros, widths)


def candidates_of(settings: CompensatedSettings | None, device: torch.device) -> Candidates:
    """The grids that `compensated_grid.fit_compensated` tries, in its order; none without it."""
    from bitmill_kernels.group_solve_triton import Candidates

    if settings is None:
        return Candidates([], [], 0, device)
    first = [(1.0, 0.0), *((scale, 0.0) for scale in settings.scales)]
    then = [(scale, float(step)) for step in settings.zero_steps for scale in settings.zero_scales]
    return Candidates(first, then, settings.least_squares, device)
