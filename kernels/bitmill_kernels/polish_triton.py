"""One visit of a group by `bitmill.polish` as one Triton kernel: scales, codes, scales again.

With v = q - z, slope g = (W - ŵ) H and P = H v of the group, the scale takes a step d and the slope
becomes g - d P. Columns then take their steps in order; a column's own slope has lost s H D, with s
the new scale and D the changes of codes before it, so

    q_j <- clamp(round(q_j + (g_j - d P_j) / (s H_jj) - sum_i<j H_ji D_i / H_jj))

Parts of 32 columns are unrolled, one row to a thread; products between parts take the tensor cores,
with H split in two (codes are exact there). The last fit of the scale needs no product, only sums:

    <g', v + D> = <g, v> - d <P, v> + <g - d P, D> - s (<P, D> + <D, H D>)
    <v + D, H (v + D)> = <P, v> + 2 <P, D> + <D, H D>

Tensors are columns first, [C, R].
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bitmill_kernels.clip_search_triton import LARGEST_SCALE, ROUNDING, _half, _inverse
from bitmill_kernels.layout import GROUP_SIZE

PART = GROUP_SIZE // 4
ROWS_PER_PROGRAM = 32

VARYING = ("R", "C", "codes_stride", "slope_stride", "h_stride", "change_stride")
"""As in `group_solve_triton.py`: strides are not known to be multiples of 16."""


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
def _product(h: tl.tensor, v: tl.tensor, total: tl.tensor) -> tl.tensor:
    """total + h v for v that fits 11 bits; h is split in two."""
    high = (h.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    total = tl.dot(high, v, total, input_precision="tf32")
    return tl.dot(h - high, v, total, input_precision="tf32")


@triton.jit
def _descend(
    aim: tl.tensor,
    old: tl.tensor,
    h: tl.tensor,
    largest: tl.tensor,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Changes of codes D and sums h D [PART, ROWS] over the columns before each.

    aim: codes wanted before any column of the part has moved; h [PART, PART]: H_ji / H_jj.
    """
    column = tl.arange(0, PART)[:, None]
    taken = tl.zeros((PART, ROWS), tl.float32)
    for j in tl.static_range(PART):
        row = tl.sum(tl.where(column == j, h, -0.0), axis=0)
        spread = tl.where(column < j, row[:, None] * taken, -0.0)
        wanted = tl.sum(tl.where(column == j, aim, spread), axis=0)
        code = tl.minimum(tl.maximum(wanted, 0.0), largest)
        code = (code + ROUNDING) - ROUNDING
        before = tl.sum(tl.where(column == j, old, -0.0), axis=0)
        taken = tl.where(column == j, (before - code)[None, :], taken)
        aim = tl.where(column == j, aim - wanted[None, :], aim)
    return -taken, aim


@triton.jit(do_not_specialize=VARYING)
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
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[None, :]
    column = tl.arange(0, PART)
    live = (row < R) | WHOLE
    lane = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_live = (lane < R) | WHOLE
    begun = tl.load(scale_ptr + lane, mask=row_live, other=0.0)
    zero = tl.load(zero_ptr + lane, mask=row_live, other=0.0)
    largest = tl.load(largest_ptr + lane, mask=row_live, other=1.0)
    for first in range(0, C, PART):
        mine = first + column
        product = tl.zeros((PART, ROWS), tl.float32)
        for other in range(0, C, PART):
            theirs = other + column
            mask = ((theirs[:, None] < C) | WHOLE) & live
            v = tl.load(codes_ptr + theirs[:, None] * codes_stride + row, mask=mask, other=0)
            v = tl.where(mask, v.to(tl.float32) - zero[None, :], 0.0)
            mask = ((mine[:, None] < C) & (theirs[None, :] < C)) | WHOLE
            h = h_ptr + mine[:, None] * h_stride + theirs[None, :]
            product = _product(tl.load(h, mask=mask, other=0.0), v, product)
        mask = ((mine[:, None] < C) | WHOLE) & live
        tl.store(change_ptr + mine[:, None] * change_stride + row, product, mask=mask)
    tl.debug_barrier()
    along = tl.zeros((ROWS,), tl.float32)
    square = tl.zeros((ROWS,), tl.float32)
    for first in range(0, C, PART):
        mine = (first + column)[:, None]
        mask = ((mine < C) | WHOLE) & live
        v = tl.load(codes_ptr + mine * codes_stride + row, mask=mask, other=0)
        v = v.to(tl.float32) - zero[None, :]
        slope = tl.load(slope_ptr + mine * slope_stride + row, mask=mask, other=0.0)
        product = tl.load(change_ptr + mine * change_stride + row, mask=mask, other=0.0)
        along += tl.sum(slope * v, axis=0)
        square += tl.sum(product * v, axis=0)
    scale = _better_scale(begun, along, square)
    inverse = _inverse(scale)
    step = scale - begun
    along -= step * square
    mixed = tl.zeros((ROWS,), tl.float32)
    own = tl.zeros((ROWS,), tl.float32)
    for first in range(0, C, PART):
        mine = first + column
        spread = tl.zeros((PART, ROWS), tl.float32)
        for other in range(0, first, PART):
            theirs = other + column
            moved = tl.load(new_ptr + theirs[:, None] * codes_stride + row, mask=live, other=0)
            old = tl.load(codes_ptr + theirs[:, None] * codes_stride + row, mask=live, other=0)
            h = h_ptr + mine[:, None] * h_stride + theirs[None, :]
            h = tl.load(h, mask=(mine[:, None] < C) | WHOLE, other=0.0)
            spread = _product(h, moved.to(tl.float32) - old.to(tl.float32), spread)
        mask = ((mine[:, None] < C) | WHOLE) & live
        place = change_ptr + mine[:, None] * change_stride + row
        product = tl.load(place, mask=mask, other=0.0)
        tl.debug_barrier()
        tl.store(place, spread, mask=mask)
        tl.debug_barrier()
        spread = tl.load(place, mask=mask, other=0.0)
        slope = tl.load(slope_ptr + mine[:, None] * slope_stride + row, mask=mask, other=0.0)
        slope -= step[None, :] * product
        inside = (mine < C) | WHOLE
        reciprocal = tl.load(reciprocal_ptr + mine, mask=inside, other=0.0)[:, None]
        old = tl.load(codes_ptr + mine[:, None] * codes_stride + row, mask=mask, other=0)
        old = old.to(tl.float32)
        mask_h = (inside[:, None] & inside[None, :]) | WHOLE
        h = tl.load(h_ptr + mine[:, None] * h_stride + mine[None, :], mask=mask_h, other=0.0)
        towards = slope * inverse[None, :] - tl.where(scale > 0, spread, 0.0)
        taken, sums = _descend(old + towards * reciprocal, old, h * reciprocal, largest, PART, ROWS)
        tl.store(
            new_ptr + mine[:, None] * codes_stride + row, (old + taken).to(tl.uint8), mask=mask
        )
        diagonal = tl.load(h_ptr + mine * (h_stride + 1), mask=inside, other=0.0)[:, None]
        along += tl.sum(slope * taken, axis=0)
        mixed += tl.sum(product * taken, axis=0)
        own += tl.sum(taken * (2 * spread + diagonal * (2 * sums + taken)), axis=0)
        tl.debug_barrier()
    along -= scale * (mixed + own)
    last = _better_scale(scale, along, square + 2 * mixed + own)
    for first in range(0, C, PART):
        mine = (first + column)[:, None]
        mask = ((mine < C) | WHOLE) & live
        old = tl.load(codes_ptr + mine * codes_stride + row, mask=mask, other=0).to(tl.float32)
        new = tl.load(new_ptr + mine * codes_stride + row, mask=mask, other=0).to(tl.float32)
        change = (new - zero[None, :]) * last[None, :] - (old - zero[None, :]) * begun[None, :]
        tl.store(change_ptr + mine * change_stride + row, change, mask=mask)
    tl.store(scale_ptr + lane, last, mask=row_live)


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
        PART=PART,
        ROWS=ROWS_PER_PROGRAM,
        WHOLE=C % PART == R % ROWS_PER_PROGRAM == 0,
        num_warps=1,
        num_stages=1,
    )
