"""The search of clipped grids as one Triton kernel: a tile of rows and one group stay in registers.

Same candidates in the same order as `bitmill.quant.grid.clip_search`, for widths of 2 bits and
more: shrunk ranges, then other zero points with scales around the best, then least squares. A
candidate costs a dozen instructions per weight and no memory traffic, so one launch searches all
groups of a matrix; groups, and the rows of a group, may have different widths.

Tensors are columns first, [K, R]: neighbouring threads hold neighbouring rows, and sums over the
columns of a group stay mostly within a thread. A largest code of 0 is a dropped group's, whose grid
has scale 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitmill_kernels.layout import GROUP_SIZE

ROWS_PER_PROGRAM = 8
LARGEST_SCALE = tl.constexpr(65504.0)
ROUNDING = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting rounds to even


@triton.jit
def _inverse(scale: tl.tensor) -> tl.tensor:
    return tl.where(scale > 0, tl.math.div_rn(1.0, tl.where(scale > 0, scale, 1.0)), 0.0)


@triton.jit
def _steps(w: tl.tensor, scale: tl.tensor, zero: tl.tensor, largest: tl.tensor) -> tl.tensor:
    """code - zero of w [C, R] on grids [R]."""
    code = w * _inverse(scale)[None, :] + zero[None, :]
    code = tl.minimum(tl.maximum(code, 0.0), largest[None, :])
    return ((code + ROUNDING) - ROUNDING) - zero[None, :]


@triton.jit
def _error(
    w: tl.tensor, h: tl.tensor, scale: tl.tensor, zero: tl.tensor, largest: tl.tensor
) -> tl.tensor:
    missed = w - _steps(w, scale, zero, largest) * scale[None, :]
    return tl.sum(missed * missed * h[:, None], axis=0)


@triton.jit
def _better(
    w: tl.tensor,
    h: tl.tensor,
    largest: tl.tensor,
    new_scale: tl.tensor,
    new_zero: tl.tensor,
    best: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Error and grid [R] of the better of two grids, the old one where they are equal."""
    error = _error(w, h, new_scale, new_zero, largest)
    better = error < best
    return (
        tl.where(better, error, best),
        tl.where(better, new_scale, scale),
        tl.where(better, new_zero, zero),
    )


@triton.jit
def _half(scale: tl.tensor) -> tl.tensor:
    return scale.to(tl.float16).to(tl.float32)


@triton.jit(
    do_not_specialize=(
        "R",
        "K",
        "largest_group_stride",
        "largest_row_stride",
        "shrinks",
        "moves",
        "fits",
    )
)
def _clip_search_kernel(
    w_ptr: tl.tensor,
    h_ptr: tl.tensor,
    largest_ptr: tl.tensor,
    shrink_ptr: tl.tensor,
    factor_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    R: tl.tensor,
    K: tl.tensor,
    column_stride: tl.tensor,
    row_stride: tl.tensor,
    largest_group_stride: tl.tensor,
    largest_row_stride: tl.tensor,
    shrinks: tl.tensor,
    moves: tl.tensor,
    fits: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    group = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = group * COLUMNS + tl.arange(0, COLUMNS)
    row_live = row < R
    live = (column[:, None] < K) & row_live[None, :]
    place = column.to(tl.int64)[:, None] * column_stride + row.to(tl.int64)[None, :] * row_stride
    w = tl.load(w_ptr + place, mask=live, other=0.0)
    h = tl.load(h_ptr + column, mask=column < K, other=0.0)
    at = largest_ptr + group * largest_group_stride + row * largest_row_stride
    largest = tl.load(at, mask=row_live, other=1.0)
    low = tl.minimum(tl.min(w, axis=0), 0.0)
    high = tl.maximum(tl.max(w, axis=0), 0.0)
    step = tl.where(largest > 0, tl.math.div_rn(high - low, tl.maximum(largest, 1.0)), 0.0)
    middle = tl.math.div_rn(-low, tl.where(step > 0, step, 1.0))
    middle = tl.minimum((middle + ROUNDING) - ROUNDING, largest)
    widest = _half(step)
    best = tl.full((ROWS,), float("inf"), tl.float32)
    scale = tl.zeros((ROWS,), tl.float32)
    zero = tl.zeros((ROWS,), tl.float32)
    for i in range(shrinks):
        new_scale = _half(step * tl.load(shrink_ptr + i))
        new_zero = tl.where(new_scale > 0, middle, 0.0)
        best, scale, zero = _better(w, h, largest, new_scale, new_zero, best, scale, zero)
    base_scale = scale
    base_zero = zero
    for i in range(moves):
        new_scale = _half(tl.minimum(base_scale * tl.load(factor_ptr + i), LARGEST_SCALE))
        new_zero = tl.minimum(tl.maximum(base_zero + tl.load(offset_ptr + i), 0.0), largest)
        new_zero = tl.where(new_scale > 0, new_zero, 0.0)
        best, scale, zero = _better(w, h, largest, new_scale, new_zero, best, scale, zero)
    for _ in range(fits):
        v = _steps(w, scale, zero, largest)
        product = tl.sum(w * v * h[:, None], axis=0)
        square = tl.sum(v * v * h[:, None], axis=0)
        fitted = tl.math.div_rn(product, tl.where(square > 0, square, 1.0))
        legal = (square > 0) & (fitted > 0) & (fitted <= LARGEST_SCALE)
        new_scale = _half(tl.where(legal, fitted, scale))
        new_zero = tl.where(new_scale > 0, zero, 0.0)
        best, scale, zero = _better(w, h, largest, new_scale, new_zero, best, scale, zero)
    scale = tl.where(widest == float("inf"), widest, scale)
    out = group.to(tl.int64) * R + row
    tl.store(scale_ptr + out, scale, mask=row_live)
    tl.store(zero_ptr + out, zero, mask=row_live)


def clip_search_triton(
    w: Tensor,
    h: Tensor,
    largest: Tensor,
    shrinks: Tensor,
    moves: tuple[Tensor, Tensor] | None,
    fits: int,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Scales and zero points f32 [G, R] of the groups of w f32 [K, R], columns first.

    h: f32 [K] column weights; largest: f32 [G, R] largest codes, 0 or at least 3, may be expanded;
    shrinks: f32 shares of the range; moves: scale factors and zero offsets; fits: least squares.
    A range beyond fp16 gives an infinite scale. out: where to write them, contiguous.
    """
    K, R = w.shape
    groups = -(-K // GROUP_SIZE)
    factors, offsets = moves or (shrinks, shrinks)
    if out is None:
        out = tuple(torch.empty(2, groups, R, dtype=torch.float32, device=w.device))
    scale, zero = out
    _clip_search_kernel[(-(-R // ROWS_PER_PROGRAM), groups)](
        w,
        h.contiguous(),
        largest,
        shrinks,
        factors,
        offsets,
        scale,
        zero,
        R,
        K,
        w.stride(0),
        w.stride(1),
        largest.stride(0),
        largest.stride(1),
        len(shrinks),
        len(factors) if moves else 0,
        fits,
        ROWS=ROWS_PER_PROGRAM,
        COLUMNS=GROUP_SIZE,
        num_warps=1,
    )
    return scale, zero
