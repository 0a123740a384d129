"""GPTQ's column loop: groups of 128 columns in turn, each with its grid and its codes.

    for every column j:  e_j = w_j - ŵ_j,   w_k -= e_j U_jk / U_jj  for k > j

(arXiv 2210.17323, algorithm 1.) A block of the algorithm is one group, so its grid is found on
weights already compensated for every earlier column. Inside a super-block of four groups the
pending errors are applied when a group is reached; past it, by one matrix product per super-block.
Given H the rows are independent, so linears that read one input are solved as one tall matrix on
an accelerator (`column_loop_device.py`) and one by one here, with the same results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bitmill.quant.codes import LinearCodes, group_slices
from bitmill.quant.grid import Grid, clip_search, max_code
from bitmill.runtime.timer import timed
from bitmill.solvers.gptq.column_loop_device import solve_on_device
from bitmill.solvers.gptq.curvature import Curvature
from bitmill.solvers.gptq.settings import SUPER_BLOCK, GptqSettings
from bitmill.solvers.grid_search import fit_compensated, unit_rows
from bitmill_kernels.backend import resolve_backend
from bitmill_kernels.gptq.block import gptq_block
from bitmill_kernels.layout import GROUP_SIZE

FitGrid = Callable[[Tensor, int, slice], Grid]
"""The grid of a group: of its compensated weights f32 [N, c], its width and its columns."""


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
    with timed("solve"):
        if resolve_backend("auto", curvature.H.device) == "triton":
            return solve_on_device(matrices, curvature, widths, settings)

        def fit(block: Tensor, width: int, part: slice) -> Grid:
            return fit_grid(block, width, curvature, part, settings)

        return [
            column_loop(W, curvature, own, fit) for W, own in zip(matrices, widths, strict=True)
        ]


def column_loop(
    W: Tensor, curvature: Curvature, widths: tuple[int, ...], fit: FitGrid
) -> LinearCodes:
    """The loop on one matrix f32 [N, K], with the grid of each group by `fit`."""
    work, unit = W.clone(), unit_rows(curvature.factor.upper)
    columns, span = W.shape[1], SUPER_BLOCK * GROUP_SIZE
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
        grid = fit(block, widths[group], part)
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
    grid = clip_search(block, width, curvature.H.diagonal()[part], settings=settings.clip)
    if settings.compensated is None:
        return grid
    U = curvature.factor.upper[part, part].contiguous()
    return fit_compensated(block, width, U, grid, settings.compensated)
