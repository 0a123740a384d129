"""Visits of groups in turn by `bitmill.polish` as one Triton kernel: scales, codes, scales again.

Rows are independent, so a program takes its rows through several groups; a group's slope loses what
the groups before it in the same launch have changed, and the caller carries all changes on.

With v = q - z, slope g = (W - ŵ) H and P = H v of the group, the scale takes a step d and the slope
becomes g - d P. Columns then take their steps in order; a column's own slope has lost s H D, with s
the new scale and D the changes of codes before it, so

    q_j <- clamp(round(q_j + (g_j - d P_j) / (s H_jj) - sum_i<j H_ji D_i / H_jj))

Parts of 32 columns are unrolled, one row to a thread; products between parts take the tensor cores,
with H split in two (codes are exact there). The last fit of the scale needs no product, only sums:

    <g', v + D> = <g, v> - d <P, v> + <g - d P, D> - s (<P, D> + <D, H D>)
    <v + D, H (v + D)> = <P, v> + 2 <P, D> + <D, H D>

Tensors are columns first, [K, R].
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bitmill_kernels.clip_search_triton import LARGEST_SCALE, ROUNDING, _half, _inverse
from bitmill_kernels.layout import GROUP_SIZE
from bitmill_kernels.split_dot_triton import split_dot, split_left_dot

PART = GROUP_SIZE // 4
ROWS_PER_PROGRAM = 32

VARYING = ("R", "K", "stride", "h_stride")
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


@triton.jit
def _values(codes_ptr: tl.tensor, at: tl.tensor, mask: tl.tensor, zero: tl.tensor) -> tl.tensor:
    """v = q - z of a tile, 0 where masked."""
    codes = tl.load(codes_ptr + at, mask=mask, other=0).to(tl.float32)
    return tl.where(mask, codes - zero[None, :], 0.0)


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
    own_slope_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    R: tl.tensor,
    K: tl.tensor,
    stride: tl.tensor,
    h_stride: tl.tensor,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    lane = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_live = (lane < R) | WHOLE
    row, live = lane[None, :], row_live[None, :]
    column = tl.arange(0, PART)
    for start in range(0, K, 4 * PART):
        stop = tl.minimum(start + 4 * PART, K)
        at = start // (4 * PART) * stride + lane
        begun = tl.load(scale_ptr + at, mask=row_live, other=0.0)
        zero = tl.load(zero_ptr + at, mask=row_live, other=0.0)
        largest = tl.load(largest_ptr + at, mask=row_live, other=1.0)
        for first in range(start, stop, PART):
            mine = first + column
            inside = (mine[:, None] < stop) | WHOLE
            here = mine[:, None] * stride + row
            pending = tl.zeros((PART, ROWS), tl.float32)
            for other in range(0, start, PART):
                theirs = other + column
                change = tl.load(change_ptr + theirs[:, None] * stride + row, mask=live, other=0.0)
                h = h_ptr + mine[:, None] * h_stride + theirs[None, :]
                h = tl.load(h, mask=inside, other=0.0)
                pending = split_dot(h, change, pending)
            slope = tl.load(slope_ptr + here, mask=inside & live, other=0.0) - pending
            product = tl.zeros((PART, ROWS), tl.float32)
            for other in range(start, stop, PART):
                theirs = other + column
                mask = ((theirs[:, None] < stop) | WHOLE) & live
                v = _values(codes_ptr, theirs[:, None] * stride + row, mask, zero)
                mask = inside & ((theirs[None, :] < stop) | WHOLE)
                h = h_ptr + mine[:, None] * h_stride + theirs[None, :]
                product = split_left_dot(tl.load(h, mask=mask, other=0.0), v, product)
            tl.store(own_slope_ptr + here, slope, mask=inside & live)
            tl.store(change_ptr + here, product, mask=inside & live)
        tl.debug_barrier()
        along = tl.zeros((ROWS,), tl.float32)
        square = tl.zeros((ROWS,), tl.float32)
        for first in range(start, stop, PART):
            mine = (first + column)[:, None]
            mask = ((mine < stop) | WHOLE) & live
            here = mine * stride + row
            v = _values(codes_ptr, here, mask, zero)
            along += tl.sum(tl.load(own_slope_ptr + here, mask=mask, other=0.0) * v, axis=0)
            square += tl.sum(tl.load(change_ptr + here, mask=mask, other=0.0) * v, axis=0)
        scale = _better_scale(begun, along, square)
        inverse = _inverse(scale)
        step = scale - begun
        along -= step * square
        mixed = tl.zeros((ROWS,), tl.float32)
        own = tl.zeros((ROWS,), tl.float32)
        for first in range(start, stop, PART):
            mine = first + column
            inside = (mine < stop) | WHOLE
            spread = tl.zeros((PART, ROWS), tl.float32)
            for other in range(start, first, PART):
                theirs = other + column
                there = theirs[:, None] * stride + row
                moved = _values(new_ptr, there, live, zero) - _values(codes_ptr, there, live, zero)
                h = h_ptr + mine[:, None] * h_stride + theirs[None, :]
                spread = split_left_dot(tl.load(h, mask=inside[:, None], other=0.0), moved, spread)
            mask = inside[:, None] & live
            here = mine[:, None] * stride + row
            product = tl.load(change_ptr + here, mask=mask, other=0.0)
            tl.debug_barrier()
            tl.store(change_ptr + here, spread, mask=mask)
            tl.debug_barrier()
            spread = tl.load(change_ptr + here, mask=mask, other=0.0)
            slope = tl.load(own_slope_ptr + here, mask=mask, other=0.0) - step[None, :] * product
            reciprocal = tl.load(reciprocal_ptr + mine, mask=inside, other=0.0)[:, None]
            old = tl.load(codes_ptr + here, mask=mask, other=0).to(tl.float32)
            h = h_ptr + mine[:, None] * h_stride + mine[None, :]
            h = tl.load(h, mask=inside[:, None] & inside[None, :], other=0.0)
            towards = slope * inverse[None, :] - tl.where(scale > 0, spread, 0.0)
            aim = old + towards * reciprocal
            taken, sums = _descend(aim, old, h * reciprocal, largest, PART, ROWS)
            tl.store(new_ptr + here, (old + taken).to(tl.uint8), mask=mask)
            diagonal = tl.load(h_ptr + mine * (h_stride + 1), mask=inside, other=0.0)[:, None]
            along += tl.sum(slope * taken, axis=0)
            mixed += tl.sum(product * taken, axis=0)
            own += tl.sum(taken * (2 * spread + diagonal * (2 * sums + taken)), axis=0)
            tl.debug_barrier()
        along -= scale * (mixed + own)
        last = _better_scale(scale, along, square + 2 * mixed + own)
        tl.store(scale_ptr + at, last, mask=row_live)
        for first in range(start, stop, PART):
            mine = (first + column)[:, None]
            mask = ((mine < stop) | WHOLE) & live
            here = mine * stride + row
            new = _values(new_ptr, here, mask, zero)
            change = new * last[None, :] - _values(codes_ptr, here, mask, zero) * begun[None, :]
            tl.store(change_ptr + here, change, mask=mask)
            high = change.to(tl.bfloat16)
            low = (change - high.to(tl.float32)).to(tl.bfloat16)
            part = parts_ptr + (2 * start + mine) * stride + row
            tl.store(part, high, mask=mask)
            tl.store(part + (stop - start) * stride, low, mask=mask)
            tl.store(part + 2 * (stop - start) * stride, high, mask=mask)
        tl.debug_barrier()


def polish_groups_triton(
    codes: Tensor,
    slope: Tensor,
    H: Tensor,
    reciprocal: Tensor,
    scale: Tensor,
    zero: Tensor,
    largest: Tensor,
    new: Tensor,
    scratch: Tensor,
    parts: Tensor,
) -> None:
    """New codes and scales of a few groups in turn, columns first; scales in place.

    codes: u8 [K, R]; slope: f32 [K, R]; H: f32 [K, K]; reciprocal: f32 [K] 1 / H_jj, 0 where H_jj
    is not positive; scale, zero, largest: f32 [G, R]. Written: new codes u8 [K, R], scale, and the
    change of the values as `split_product.grouped_parts` of a right factor, bf16 [3 K, R]; scratch:
    f32 [2, K, R], of which the first is that change in the end. All but H are contiguous.
    """
    K, R = codes.shape
    _polish_kernel[(triton.cdiv(R, ROWS_PER_PROGRAM),)](
        codes,
        slope,
        H,
        reciprocal,
        scale,
        zero,
        largest,
        new,
        scratch[0],
        scratch[1],
        parts,
        R,
        K,
        R,
        H.stride(0),
        PART=PART,
        ROWS=ROWS_PER_PROGRAM,
        WHOLE=K % PART == R % ROWS_PER_PROGRAM == 0,
        num_warps=1,
        num_stages=1,
    )
