"""The grid of a group, fitted by the loss that GPTQ itself will pay.

    loss(s, z) = sum_j (e_j / U_jj)^2,   e from the GPTQ column loop on this group

U is the group's own block of the factor. With every column before the group frozen and every
column after it free to compensate, the loss of an error D in the group is |D U^-1|^2, and the
column loop reaches that sum of squares. Where `clip_search` sees columns one by one, this search
runs the loop for every candidate scale and zero point (all candidates of all rows as one batch),
then alternates: scale by least squares in that metric, s = <w U^-1, v U^-1> / |v U^-1|^2, and codes
by the loop again. The best candidate seen is kept, so the loss is never above the starting grid's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitmill.quant.grid import (
    FP16_MAX,
    ONE_BIT_ZERO_STEPS,
    Grid,
    chunk_elements,
    legal_candidates,
    max_code,
    pick,
)
from bitmill_kernels.gptq.block import gptq_block


@dataclass(frozen=True)
class CompensatedSettings:
    """Candidates around the starting grid: first scales (as factors), then other zero points (as
    steps) with scales around the best one; then alternations of scale and codes."""

    scales: tuple[float, ...] = (0.82, 0.88, 0.94, 0.97, 1.03, 1.06, 1.12, 1.18)
    zero_steps: tuple[int, ...] = (-1, 1)
    zero_scales: tuple[float, ...] = (0.93, 1.0, 1.07)
    least_squares: int = 2


def fit_compensated(
    W: Tensor, width: int, U: Tensor, start: Grid, settings: CompensatedSettings
) -> Grid:
    """A grid for W f32 [N, C], already compensated for the columns before this group.

    U f32 [C, C] is the group's upper triangular block of the factor, not divided by its diagonal.
    """
    grid, loss = _best(W, _around(start, width, settings.scales, (0,)), width, U)
    if settings.zero_steps:
        moved = _around(grid, width, settings.zero_scales, settings.zero_steps)
        grid, loss = _best(W, moved, width, U)
    eye = torch.eye(len(U), dtype=U.dtype, device=U.device)
    inverse = torch.linalg.solve_triangular(U, eye, upper=True)
    target = W @ inverse
    for _ in range(settings.least_squares):
        fitted = _least_squares(W, grid, width, U, target, inverse)
        loss_fitted = compensated_loss(W, Grid(fitted[:, None], grid.zero[:, None]), width, U)[:, 0]
        better = loss_fitted < loss
        grid = Grid(torch.where(better, fitted, grid.scale), grid.zero)
        loss = torch.minimum(loss, loss_fitted)
    return grid


def compensated_loss(W: Tensor, candidates: Grid, width: int, U: Tensor) -> Tensor:
    """sum_j (e_j / U_jj)^2 of the GPTQ loop for every row and candidate, f32 [N, P]."""
    count = candidates.scale.shape[1]
    rows = max(1, 8 * chunk_elements(W.device) // (count * W.shape[1]))
    unit, diagonal = unit_rows(U), U.diagonal()
    parts = []
    for start in range(0, W.shape[0], rows):
        part = slice(start, start + rows)
        scale, zero = candidates.scale[part].flatten(), candidates.zero[part].flatten()
        repeated = W[part].repeat_interleave(count, 0)
        _, error = gptq_block(repeated, unit, scale, zero, max_code(width))
        parts.append((error / diagonal).square().sum(1).view(-1, count))
    return torch.cat(parts)


def unit_rows(U: Tensor) -> Tensor:
    """U with every row divided by its diagonal entry, as the column loop takes it."""
    return U / U.diagonal()[:, None]


def _around(
    start: Grid, width: int, scales: tuple[float, ...], zero_steps: tuple[int, ...]
) -> Grid:
    """The grid itself first, then every scale with every zero point."""
    factors = torch.tensor(scales, device=start.scale.device, dtype=torch.float32)
    steps = torch.tensor(zero_steps, device=start.scale.device, dtype=torch.float32)
    steps = steps / ONE_BIT_ZERO_STEPS if width == 1 else steps
    scale = (start.scale[:, None, None] * factors).expand(-1, len(steps), -1).flatten(1)
    zero = (start.zero[:, None, None] + steps[:, None]).expand(-1, -1, len(factors)).flatten(1)
    return legal_candidates(
        torch.cat([start.scale[:, None], scale.clamp(max=FP16_MAX)], 1),
        torch.cat([start.zero[:, None], zero], 1),
        width,
    )


def _best(W: Tensor, candidates: Grid, width: int, U: Tensor) -> tuple[Grid, Tensor]:
    losses = compensated_loss(W, candidates, width, U)
    return pick(candidates, losses), losses.amin(1)


def _least_squares(
    W: Tensor, grid: Grid, width: int, U: Tensor, target: Tensor, inverse: Tensor
) -> Tensor:
    """The scale of least loss for the codes of the loop, rounded through fp16, [N]."""
    codes, _ = gptq_block(W, unit_rows(U), grid.scale, grid.zero, max_code(width))
    v = (codes.float() - grid.zero[:, None]) @ inverse
    scale = (target * v).sum(1) / v.square().sum(1)
    rounded = scale.clamp(max=FP16_MAX).to(torch.float16).float()
    legal = torch.isfinite(rounded) & (rounded > 0) & (grid.scale > 0)
    return torch.where(legal, rounded, grid.scale)
