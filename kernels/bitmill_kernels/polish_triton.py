"""One visit of a group by `bitmill.polish` as one Triton kernel: scales, codes, scales again.

A tile of rows keeps its slope g = (W - ŵ) H and the product H v of the group in registers, v = q -
z. Every column takes its step and spreads it over both, so the least squares of the scale after the
descent are at hand without another product. Tensors are columns first, [C, R].
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bitmill_kernels.clip_search_triton import LARGEST_SCALE, ROUNDING, _half, _inverse
from bitmill_kernels.layout import GROUP_SIZE

ROWS_PER_PROGRAM = 16


@triton.jit
def _better_scale(scale: tl.tensor, slope: tl.tensor, curvature: tl.tensor) -> tl.tensor:
    """The fp16 scale nearest the optimum where that lowers the error, else the old one."""
    rises = curvature > 0
    ideal = scale + tl.math.div_rn(slope, tl.where(rises, curvature, 1.0))
    new = _half(tl.minimum(tl.maximum(ideal, 0.0), LARGEST_SCALE))
    step = new - scale
    helps = step * (2 * slope - curvature * step) > 0
    return tl.where(helps & rises & (scale > 0) & (new > 0), new, scale)


@triton.jit
def _polish_kernel(
    codes_ptr: tl.tensor,
    slope_ptr: tl.tensor,
    h_ptr: tl.tensor,
    reciprocal_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    largest_ptr: tl.tensor,
    new_ptr: tl.tensor,
    change_ptr: tl.tensor,
    R: tl.tensor,
    C: tl.tensor,
    codes_stride: tl.tensor,
    slope_stride: tl.tensor,
    h_stride: tl.tensor,
    change_stride: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    row_live = row < R
    live = (column[:, None] < C) & row_live[None, :]
    at = column.to(tl.int64)[:, None]
    old = tl.load(codes_ptr + at * codes_stride + row[None, :], mask=live, other=0)
    slope = tl.load(slope_ptr + at * slope_stride + row[None, :], mask=live, other=0.0)
    scale = tl.load(scale_ptr + row, mask=row_live, other=0.0)
    zero = tl.load(zero_ptr + row, mask=row_live, other=0.0)
    largest = tl.load(largest_ptr + row, mask=row_live, other=1.0)
    begun = scale
    product = tl.zeros((COLUMNS, ROWS), tl.float32)
    for j in range(C):
        v = tl.load(codes_ptr + j * codes_stride + row, mask=row_live, other=0).to(tl.float32)
        h = tl.load(h_ptr + j * h_stride + column, mask=column < C, other=0.0)
        product += h[:, None] * (v - zero)[None, :]
    v = tl.where(live, old.to(tl.float32) - zero[None, :], 0.0)
    along = tl.sum(slope * v, axis=0)
    scale = _better_scale(scale, along, tl.sum(product * v, axis=0))
    slope -= product * (scale - begun)[None, :]
    inverse = _inverse(scale)
    for j in range(C):
        before = tl.load(codes_ptr + j * codes_stride + row, mask=row_live, other=0)
        before = before.to(tl.float32)
        g = tl.sum(tl.where(column[:, None] == j, slope, 0.0), axis=0)
        code = before + g * inverse * tl.load(reciprocal_ptr + j)
        code = tl.minimum(tl.maximum(code, 0.0), largest)
        code = (code + ROUNDING) - ROUNDING
        tl.store(new_ptr + j * codes_stride + row, code.to(tl.uint8), mask=row_live)
        h = tl.load(h_ptr + j * h_stride + column, mask=column < C, other=0.0)
        slope -= h[:, None] * ((code - before) * scale)[None, :]
        product += h[:, None] * (code - before)[None, :]
    tl.debug_barrier()
    new = tl.load(new_ptr + at * codes_stride + row[None, :], mask=live, other=0)
    w = tl.where(live, new.to(tl.float32) - zero[None, :], 0.0)
    along = tl.sum(slope * w, axis=0)
    scale = _better_scale(scale, along, tl.sum(product * w, axis=0))
    again = tl.load(codes_ptr + at * codes_stride + row[None, :], mask=live, other=0)
    v = again.to(tl.float32) - zero[None, :]
    change = w * scale[None, :] - v * begun[None, :]
    tl.store(change_ptr + at * change_stride + row[None, :], change, mask=live)
    tl.store(scale_ptr + row, scale, mask=row_live)


def polish_group_triton(
    codes: Tensor,
    slope: Tensor,
    H: Tensor,
    reciprocal: Tensor,
    scale: Tensor,
    zero: Tensor,
    largest: Tensor,
    new: Tensor,
    change: Tensor,
) -> None:
    """New codes and values of one group, columns first, and its scales in place.

    codes: u8 [C, R]; slope: f32 [C, R]; H: f32 [C, C]; reciprocal: f32 [C] 1 / H_jj, 0 where H_jj
    is not positive; scale, zero, largest: f32 [R]. Written: new codes u8 [C, R] (strided as codes
    are), change of the values f32 [C, R], scale. Rows of all matrices are contiguous.
    """
    C, R = codes.shape
    _polish_kernel[(triton.cdiv(R, ROWS_PER_PROGRAM),)](
        codes,
        slope,
        H,
        reciprocal,
        scale,
        zero,
        largest,
        new,
        change,
        R,
        C,
        codes.stride(0),
        slope.stride(0),
        H.stride(0),
        change.stride(0),
        ROWS=ROWS_PER_PROGRAM,
        COLUMNS=GROUP_SIZE,
        num_warps=1,
    )
