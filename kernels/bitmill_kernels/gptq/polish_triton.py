"""`bitmill.solvers.polish`'s visits of groups as one Triton kernel: scales, codes, scales again.

Rows are independent, so a program takes its rows through several groups; a group's slope loses what
the groups before it in the same launch have changed, and the caller carries all changes on.

With v = q - z, slope g = (W - ŵ) H and P = H v of the group, the scale takes a step d and the slope
becomes g - d P. Columns then take their steps in order; a column's own slope has lost s H D, with s
the new scale and D the changes of codes before it, so

    q_j <- clamp(round(q_j + (g_j - d P_j) / (s H_jj) - sum_i<j H_ji D_i / H_jj))

Parts of 32 columns are unrolled, one row to a thread. The last fit of the scale needs no product,
only sums:

    <g', v + D> = <g, v> - d <P, v> + <g - d P, D> - s (<P, D> + <D, H D>)
    <v + D, H (v + D)> = <P, v> + 2 <P, D> + <D, H D>

All products take the tensor cores, in bf16: codes are exact there, H comes split as the caller has
it for its own products, and changes are left split as those take them (`linalg/split_product.py`).
So
nothing is split here, and reads are 16 bytes wide, which matters most: a program has few others
beside it to wait with. H in fp32 serves only the unrolled parts.

Tensors are columns first, [K, R].
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bitmill_kernels.gptq.clip_search_triton import LARGEST_SCALE, ROUNDING, _half, _inverse
from bitmill_kernels.layout import GROUP_SIZE

PART = GROUP_SIZE // 4
ROWS_PER_PROGRAM = 32
SCRATCH_COLUMNS = 2 * GROUP_SIZE + PART

VARYING = ("R", "K", "stride", "h_stride")
"""As in `group_solve_triton.py`: these strides are not known to be multiples of 16, which leaves a
row whole to a thread. `wide` and `h_wide` are the same numbers, known to be, for wide loads."""


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
    h_parts_ptr: tl.tensor,
    reciprocal_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    largest_ptr: tl.tensor,
    new_ptr: tl.tensor,
    pending_ptr: tl.tensor,
    product_ptr: tl.tensor,
    spread_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    R: tl.tensor,
    K: tl.tensor,
    stride: tl.tensor,
    h_stride: tl.tensor,
    wide: tl.tensor,
    h_wide: tl.tensor,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    lane = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_live = (lane < R) | WHOLE
    row, live = lane[None, :], row_live[None, :]
    column = tl.arange(0, PART)
    # Loads of one shape get one layout: wide ones take other shapes than [PART, ROWS].
    TILE: tl.constexpr = 2 * PART
    tile = tl.arange(0, TILE)
    half = tl.arange(0, PART // 2)
    for start in range(0, K, 4 * PART):
        size = tl.minimum(K - start, 4 * PART)
        at = start // (4 * PART) * stride + lane
        begun = tl.load(scale_ptr + at, mask=row_live, other=0.0)
        zero = tl.load(zero_ptr + at, mask=row_live, other=0.0)
        largest = tl.load(largest_ptr + at, mask=row_live, other=1.0)
        high_ptr = h_parts_ptr + 3 * start * h_wide + start
        low_ptr = high_ptr + 2 * size * h_wide
        for first in range(0, size, TILE):
            mine = (first + tile)[None, :]
            inside = (mine < size) | WHOLE
            pending = tl.zeros((TILE, ROWS), tl.float32)
            for k in range(0, 3 * start, TILE):
                theirs = (k + tile)[:, None]
                h = h_parts_ptr + theirs * h_wide + start + mine
                h = tl.load(h, mask=inside, other=0.0)
                change = tl.load(parts_ptr + theirs * wide + row, mask=live, other=0.0)
                pending = tl.dot(tl.trans(h), change, pending)
            product = tl.zeros((TILE, ROWS), tl.float32)
            for k in range(0, size, TILE):
                theirs = (k + tile)[:, None]
                known = (theirs < size) | WHOLE
                v = _values(codes_ptr, (start + theirs) * wide + row, known & live, zero)
                v = v.to(tl.bfloat16)
                h = tl.load(low_ptr + theirs * h_wide + mine, mask=known & inside, other=0.0)
                product = tl.dot(tl.trans(h), v, product)
                h = tl.load(high_ptr + theirs * h_wide + mine, mask=known & inside, other=0.0)
                product = tl.dot(tl.trans(h), v, product)
            mine = (first + tile)[:, None]
            mask = ((mine < size) | WHOLE) & live
            tl.store(pending_ptr + mine * wide + row, pending, mask=mask)
            tl.store(product_ptr + mine * wide + row, product, mask=mask)
        tl.debug_barrier()
        along = tl.zeros((ROWS,), tl.float32)
        square = tl.zeros((ROWS,), tl.float32)
        for first in range(0, size, PART):
            mine = (first + column)[:, None]
            mask = ((mine < size) | WHOLE) & live
            here = mine * stride + row
            v = _values(codes_ptr, start * stride + here, mask, zero)
            slope = tl.load(slope_ptr + start * stride + here, mask=mask, other=0.0)
            slope -= tl.load(pending_ptr + here, mask=mask, other=0.0)
            along += tl.sum(slope * v, axis=0)
            square += tl.sum(tl.load(product_ptr + here, mask=mask, other=0.0) * v, axis=0)
        scale = _better_scale(begun, along, square)
        inverse = _inverse(scale)
        step = scale - begun
        along -= step * square
        mixed = tl.zeros((ROWS,), tl.float32)
        own = tl.zeros((ROWS,), tl.float32)
        moved_ptr = parts_ptr + 3 * start * wide
        for first in range(0, size, PART):
            mine = first + column
            inside = (mine < size) | WHOLE
            mask = inside[:, None] & live
            spread = tl.zeros((PART, ROWS), tl.float32)
            for k in range(0, first, PART // 2):
                theirs = (k + half)[:, None]
                moved = tl.load(moved_ptr + theirs * wide + row, mask=live, other=0.0)
                at_h = theirs * h_wide + mine[None, :]
                h = tl.load(low_ptr + at_h, mask=inside[None, :], other=0.0)
                spread = tl.dot(tl.trans(h), moved, spread)
                h = tl.load(high_ptr + at_h, mask=inside[None, :], other=0.0)
                spread = tl.dot(tl.trans(h), moved, spread)
            at_spread = spread_ptr + column[:, None] * stride + row
            tl.store(at_spread, spread, mask=live)
            tl.debug_barrier()
            spread = tl.load(at_spread, mask=live, other=0.0)
            here = mine[:, None] * stride + row
            product = tl.load(product_ptr + here, mask=mask, other=0.0)
            slope = tl.load(slope_ptr + start * stride + here, mask=mask, other=0.0)
            slope -= tl.load(pending_ptr + here, mask=mask, other=0.0) + step[None, :] * product
            reciprocal = tl.load(reciprocal_ptr + start + mine, mask=inside, other=0.0)[:, None]
            old = tl.load(codes_ptr + start * stride + here, mask=mask, other=0).to(tl.float32)
            at_h = (start + mine[:, None]) * h_stride + start + mine[None, :]
            h = tl.load(h_ptr + at_h, mask=inside[:, None] & inside[None, :], other=0.0)
            towards = slope * inverse[None, :] - tl.where(scale > 0, spread, 0.0)
            aim = old + towards * reciprocal
            taken, sums = _descend(aim, old, h * reciprocal, largest, PART, ROWS)
            tl.store(new_ptr + start * stride + here, (old + taken).to(tl.uint8), mask=mask)
            tl.store(moved_ptr + here, taken.to(tl.bfloat16), mask=mask)
            diagonal = tl.load(h_ptr + (start + mine) * (h_stride + 1), mask=inside, other=0.0)
            along += tl.sum(slope * taken, axis=0)
            mixed += tl.sum(product * taken, axis=0)
            twice = 2 * spread + diagonal[:, None] * (2 * sums + taken)
            own += tl.sum(taken * twice, axis=0)
            tl.debug_barrier()
        along -= scale * (mixed + own)
        last = _better_scale(scale, along, square + 2 * mixed + own)
        tl.store(scale_ptr + at, last, mask=row_live)
        for first in range(0, size, PART):
            mine = (first + column)[:, None]
            mask = ((mine < size) | WHOLE) & live
            here = mine * stride + row
            v = _values(codes_ptr, start * stride + here, mask, zero)
            new = _values(new_ptr, start * stride + here, mask, zero)
            change = new * last[None, :] - v * begun[None, :]
            high = change.to(tl.bfloat16)
            low = (change - high.to(tl.float32)).to(tl.bfloat16)
            part = parts_ptr + 3 * start * stride + here
            tl.store(part, high, mask=mask)
            tl.store(part + size * stride, low, mask=mask)
            tl.store(part + 2 * size * stride, high, mask=mask)
        tl.debug_barrier()


def polish_groups_triton(
    codes: Tensor,
    slope: Tensor,
    H: Tensor,
    H_parts: Tensor,
    reciprocal: Tensor,
    scale: Tensor,
    zero: Tensor,
    largest: Tensor,
    new: Tensor,
    scratch: Tensor,
    parts: Tensor,
) -> None:
    """New codes and scales of a few groups in turn, columns first; scales in place.

    codes: u8 [K, R]; slope: f32 [K, R]; H: f32 [K, K], and its `split_product.grouped_parts` as a
    left factor, bf16 [3 K, K]; reciprocal: f32 [K] 1 / H_jj, 0 where H_jj is not positive; scale,
    zero, largest: f32 [G, R]. Written: new codes u8 [K, R], scale, and the change of the values as
    parts of a right factor, bf16 [3 K, R]; scratch: f32 [SCRATCH_COLUMNS, R]. All but H and H_parts
    are contiguous.
    """
    K, R = codes.shape
    pending, product, spread = scratch.split([GROUP_SIZE, GROUP_SIZE, PART])
    _polish_kernel[(-(-R // ROWS_PER_PROGRAM),)](
        codes,
        slope,
        H,
        H_parts,
        reciprocal,
        scale,
        zero,
        largest,
        new,
        pending,
        product,
        spread,
        parts,
        R,
        K,
        R,
        H.stride(0),
        R,
        H_parts.stride(0),
        PART=PART,
        ROWS=ROWS_PER_PROGRAM,
        WHOLE=K % (2 * PART) == R % ROWS_PER_PROGRAM == 0,
        num_warps=1,
        num_stages=1,
    )
