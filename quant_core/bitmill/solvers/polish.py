"""Scales and codes polished together, group by group, towards a target after the column loop.

A visit of a group fits its scales by least squares (`scale_refit.py`), lets its codes descend
(`code_descent.py`) and fits the scales again, all on the group's own slope g = (W - ŵ) H; one
matrix product then carries the change to all other groups. A sweep visits every group once and
costs 2 N K^2 operations; sweeping scales and codes in turn needs four times that for the same
error (on SmolLM2-135M, 2 sweeps equal 2 rounds of two refits and one descent within 0.3 %).

The error tr((W - ŵ) H (W - ŵ)^T) never rises. Dead columns and rows without a scale stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from bitmill.quant.codes import LinearCodes, row_errors, row_slices, stacked_largest
from bitmill.quant.grid import max_code
from bitmill.solvers.scale_refit import rounded_step
from bitmill_kernels.backend import resolve_backend
from bitmill_kernels.gptq.code_descent import descend_block
from bitmill_kernels.layout import GROUP_SIZE
from bitmill_kernels.linalg.split_product import (
    LOW_LEFT,
    grouped_parts,
    split_product,
    subtract_parts,
)

SUPER_BLOCK = 4
"""Groups whose changes reach the rest of the slope in one product, on an accelerator."""


def polish_codes(
    matrices: Sequence[Tensor], codes: Sequence[LinearCodes], H: Tensor, *, sweeps: int
) -> list[LinearCodes]:
    """New codes and scales of linears that read one input.

    matrices f32 [N_i, K] are the targets and H f32 [K, K], all in packed order.
    """
    if resolve_backend("auto", H.device) == "triton":
        return _polish_triton(matrices, codes, H, sweeps)[0]
    return [_polish_torch(W, own, H, sweeps) for W, own in zip(matrices, codes, strict=True)]


def polish_measured(
    matrices: Sequence[Tensor],
    sources: Sequence[Tensor],
    codes: Sequence[LinearCodes],
    H: Tensor,
    *,
    sweeps: int,
) -> tuple[list[LinearCodes], Tensor]:
    """`polish_codes` by Triton, and errors f64 [2, L] of each linear before and after.

    They are tr(R H R^T) with R = source - ŵ, for sources f32 [N_i, K] that may differ from the
    targets by D. With the slope S = (target - ŵ) H at hand that is <R + D, S> + tr(D H D^T).
    """
    polished, sums = _polish_triton(matrices, codes, H, sweeps, sources)
    moved = [
        H.new_zeros((), dtype=torch.float64) if W is source else row_errors(source - W, H).sum()
        for W, source in zip(matrices, sources, strict=True)
    ]
    return polished, torch.stack(sums) + torch.stack(moved)


def _polish_torch(W: Tensor, codes: LinearCodes, H: Tensor, sweeps: int) -> LinearCodes:
    result, scales = codes.codes.clone(), codes.scales.clone()
    slope = (W - codes.values()) @ H
    for _ in range(sweeps):
        for group, part in codes.groups():
            result[:, part], scales[group], change = visit_group(
                result[:, part],
                slope[:, part],
                H[part, part],
                scales[group],
                codes.zeros[group],
                max_code(codes.widths[group]),
            )
            slope -= change @ H[part]
    return LinearCodes(result, scales, codes.zeros, codes.widths)


def visit_group(
    codes: Tensor, slope: Tensor, H: Tensor, scale: Tensor, zero: Tensor, largest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """New codes u8 [N, C], scales f32 [N] and change of the values f32 [N, C] of one group.

    slope: f32 [N, C], (W - ŵ) H at these columns; H: f32 [C, C]; scale, zero: f32 [N].
    """
    v = codes.float() - zero[:, None]
    fitted, slope = _refit(v, slope, H, scale)
    new, moved = descend_block(codes, slope, H, fitted, largest)
    w = new.float() - zero[:, None]
    again, _ = _refit(w, slope - moved @ H, H, fitted)
    return new, again, again[:, None] * w - scale[:, None] * v


def _refit(v: Tensor, slope: Tensor, H: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Scales fitted to v = q - z, and the slope behind the change."""
    product = v @ H
    step = rounded_step(scale, (slope * v).sum(1), (product * v).sum(1))
    return scale + step, slope - step[:, None] * product


def _polish_triton(
    matrices: Sequence[Tensor],
    codes: Sequence[LinearCodes],
    H: Tensor,
    sweeps: int,
    sources: Sequence[Tensor] | None = None,
) -> tuple[list[LinearCodes], list[Tensor]]:
    """The linears as one matrix, columns first, [K, N]; with sources `_leaning` before and after.

    A super-block is visited in one launch, and its changes go to the slope of all groups at once.
    """
    from bitmill_kernels.gptq.polish_triton import SCRATCH_COLUMNS, polish_groups_triton

    counts = [len(W) for W in matrices]
    residual = torch.cat([(W - own.values()).T for W, own in zip(matrices, codes, strict=True)], 1)
    slope = split_product(H, residual)
    sums: list[Tensor] = []
    if sources is not None:
        sums.append(_leaning(residual.split(counts, 1), slope.split(counts, 1), matrices, sources))
    del residual
    old = torch.cat([own.codes.T for own in codes], 1)
    new = torch.empty_like(old)
    scales = torch.cat([own.scales for own in codes], 1)
    zeros = torch.cat([own.zeros for own in codes], 1)
    rows, widths = row_slices(matrices), [own.widths for own in codes]
    largest = stacked_largest(widths, rows, H.device)
    diagonal = H.diagonal()
    reciprocal = torch.where(diagonal > 0, 1.0 / diagonal, 0.0)
    (K, N), span = slope.shape, SUPER_BLOCK * GROUP_SIZE
    H_parts = grouped_parts(H, LOW_LEFT)
    scratch = torch.empty(SCRATCH_COLUMNS, N, device=H.device)
    change = torch.empty(3 * min(span, K), N, dtype=torch.bfloat16, device=H.device)
    for _ in range(sweeps):
        for first in range(0, K, span):
            part = slice(first, min(first + span, K))
            groups = slice(first // GROUP_SIZE, -(-part.stop // GROUP_SIZE))
            changed = H_parts[3 * part.start : 3 * part.stop]
            polish_groups_triton(
                old[part],
                slope[part],
                H[part, part],
                changed[:, part],
                reciprocal[part],
                scales[groups],
                zeros[groups],
                largest[groups],
                new[part],
                scratch,
                change,
            )
            subtract_parts(slope, changed.T, change[: len(changed)])
        old, new = new, old
    polished = [
        LinearCodes(old[:, mine].T.contiguous(), scales[:, mine], zeros[:, mine], own)
        for mine, own in zip(rows, widths, strict=True)
    ]
    if sources is not None:
        left = ((W - own.values()).T for W, own in zip(matrices, polished, strict=True))
        sums.append(_leaning(left, slope.split(counts, 1), matrices, sources))
    return polished, sums


def _leaning(
    residuals: Iterable[Tensor],
    slopes: Sequence[Tensor],
    matrices: Sequence[Tensor],
    sources: Sequence[Tensor],
) -> Tensor:
    """<target - ŵ + 2 D, slope> of each linear, f64 [L]; residuals target - ŵ, columns first."""
    found = []
    for R, own, W, source in zip(residuals, slopes, matrices, sources, strict=True):
        leaning = R if source is W else torch.add(R, (source - W).T, alpha=2)
        found.append((leaning * own).sum(dtype=torch.float64))
    return torch.stack(found)
