"""GPTQ's column loop with the search of its grid as one Triton kernel.

For every candidate grid of a row the loop of `block.py` runs on the group, and the grid of least

    loss = sum_j (e_j / U_jj)^2

is kept (`bitmill.solvers.grid_search` has the candidates and the reasons). Least squares need no
products with U^-1: with t = w U^-1, from the same loop without rounding, and e'_j = e_j / U_jj, the
values ŵ = s v obey v U^-1 = (t - e') / s, so the best scale is s <t, t - e'> / |t - e'|^2.

Tensors are columns first, [C, R]. The 128 columns are taken as four parts of 32. A part starts from
a product with the errors of the parts before it, in the tensor cores; inside, a thread holds a row
whole and the loop is unrolled, so that a column takes the errors before it without a word to other
threads. Parts meet in memory, not in registers, which leaves either half the layout it needs.

One row's loop is a long chain of dependent steps and a matrix has few rows for a GPU, so candidates
that do not wait for each other run in programs of their own: three launches, six loops long instead
of twenty. A later launch reads the losses of the earlier ones and finds the best again.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from bitmill_kernels.gptq.clip_search_triton import LARGEST_SCALE, ROUNDING, _half, _inverse
from bitmill_kernels.gptq.split_dot_triton import split_dot
from bitmill_kernels.layout import GROUP_SIZE

PART = GROUP_SIZE // 4
ROWS_PER_PROGRAM = 32

VARYING = (
    "R",
    "K",
    "w_stride",
    "u_stride",
    "out_stride",
    "program_stride",
    "largest_group_stride",
    "largest_row_stride",
    "settled",
    "each",
)
"""Numbers that a compiled kernel takes as they come. Of the strides it must not know that they are
multiples of 16, or it spreads a row's columns over threads for the sake of wider loads."""

UNROUNDED, AROUND, REBASE, FIT, LAST, MEASURE = -1, 0, 1, 2, 3, 4
"""Kinds of steps, each a run of the loop: for t alone; on a grid around the base, around the best
so far as the new base, fitted by least squares; on the best for the results, or for its sums."""


@triton.jit
def _part(
    w: tl.tensor,
    u: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    largest: tl.tensor,
    quantize: tl.tensor,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Codes and errors [PART, ROWS] of one part; u [PART, PART] holds U_ij / U_ii at [j, i].

    Unrolled over columns that a thread holds whole, comparisons of columns are known to the
    compiler, and so is that adding -0.0 does nothing.
    """
    column = tl.arange(0, PART)[:, None]
    inverse = _inverse(scale)
    given = tl.zeros((PART, ROWS), tl.float32)
    for j in tl.static_range(PART):
        row = tl.sum(tl.where(column == j, u, -0.0), axis=0)
        spread = tl.where(column < j, row[:, None] * given, -0.0)
        value = tl.sum(tl.where(column == j, w, spread), axis=0)
        code = tl.minimum(tl.maximum(value * inverse + zero, 0.0), largest)
        code = (code + ROUNDING) - ROUNDING
        missed = tl.where(quantize, value - (code - zero) * scale, value)
        given = tl.where(column == j, -missed[None, :], given)
        w = tl.where(column == j, code[None, :], w)
    return w, -given


@triton.jit
def _loop(
    w_ptr: tl.tensor,
    w_stride: tl.tensor,
    u_ptr: tl.tensor,
    u_stride: tl.tensor,
    reciprocal_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    t_ptr: tl.tensor,
    error_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    stride: tl.tensor,
    live: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    largest: tl.tensor,
    C: tl.tensor,
    quantize: tl.tensor,
    score: tl.tensor,
    store: tl.tensor,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
    SEARCH: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The loop over all columns; returns loss and, with `score`, <t, t - e'> and |t - e'|^2.

    It leaves the errors at error_ptr, with `store` their split parts at parts_ptr and, without
    `quantize`, t at t_ptr.
    """
    column = tl.arange(0, PART)
    loss = tl.zeros((ROWS,), tl.float32)
    along = tl.zeros((ROWS,), tl.float32)
    square = tl.zeros((ROWS,), tl.float32)
    for first in range(0, C, PART):
        mask = ((first + column[:, None] < C) | WHOLE) & live[None, :]
        place = (first + column)[:, None]
        u_part = u_ptr + (first + column[:, None]) * u_stride + column[None, :]
        carried = tl.zeros((PART, ROWS), tl.float32)
        for before in range(0, first, PART):
            at = error_ptr[None, :] + (before + column)[:, None] * stride
            error = tl.load(at, mask=live[None, :], other=0.0)
            carried = split_dot(tl.load(u_part + before), error, carried)
        out = error_ptr[None, :] + place * stride
        tl.store(out, carried, mask=mask)
        tl.debug_barrier()
        w = tl.load(w_ptr[None, :] + place * w_stride, mask=mask, other=0.0)
        w -= tl.load(out, mask=mask, other=0.0)
        tl.debug_barrier()
        u = tl.load(u_part + first)
        code, error = _part(w, u, scale, zero, largest, quantize, PART, ROWS)
        tl.store(out, error, mask=mask)
        tl.debug_barrier()
        scaled = error * tl.load(reciprocal_ptr + first + column)[:, None]
        loss += tl.sum(scaled * scaled, axis=0)
        if SEARCH:
            t_place = t_ptr[None, :] + place * stride
            if store:
                at_codes = codes_ptr[None, :] + place * stride
                tl.store(at_codes, code.to(tl.uint8), mask=mask)
                high = error.to(tl.bfloat16)
                low = (error - high.to(tl.float32)).to(tl.bfloat16)
                at_parts = parts_ptr[None, :] + place * stride
                tl.store(at_parts, high, mask=mask)
                tl.store(at_parts + C * stride, low, mask=mask)
                tl.store(at_parts + 2 * C * stride, high, mask=mask)
            elif score:
                t = tl.load(t_place, mask=mask, other=0.0)
                along += tl.sum(t * (t - scaled), axis=0)
                square += tl.sum((t - scaled) * (t - scaled), axis=0)
            elif not quantize:
                tl.store(t_place, scaled, mask=mask)
    return loss, along, square


@triton.jit
def _grid_of(
    kind: tl.tensor,
    factor: tl.tensor,
    offset: tl.tensor,
    base_scale: tl.tensor,
    base_zero: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    along: tl.tensor,
    square: tl.tensor,
    largest: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """The grid of one step: around the base, fitted to the best so far, or the best itself."""
    unit = tl.where(largest < 1.5, 0.125, 1.0)
    top = tl.where(largest < 1.5, 1.875, largest)
    moved = _half(tl.minimum(base_scale * factor, LARGEST_SCALE))
    shifted = tl.minimum(tl.maximum(base_zero + offset * unit, 0.0), top)
    ratio = tl.math.div_rn(along, tl.where(square > 0, square, 1.0))
    fitted = _half(tl.minimum(scale * ratio, LARGEST_SCALE))
    fitted = tl.where((square > 0) & (fitted > 0), fitted, scale)
    new_scale = tl.where(kind == 2, fitted, tl.where(kind > 2, scale, moved))
    new_zero = tl.where(kind >= 2, zero, shifted)
    return new_scale, tl.where(new_scale > 0, new_zero, 0.0)


@triton.jit(do_not_specialize=VARYING)
def _group_solve_kernel(
    w_ptr: tl.tensor,
    u_ptr: tl.tensor,
    reciprocal_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    largest_ptr: tl.tensor,
    factor_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    kind_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    t_ptr: tl.tensor,
    error_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    loss_ptr: tl.tensor,
    R: tl.tensor,
    K: tl.tensor,
    w_stride: tl.tensor,
    u_stride: tl.tensor,
    out_stride: tl.tensor,
    program_stride: tl.tensor,
    largest_group_stride: tl.tensor,
    largest_row_stride: tl.tensor,
    settled: tl.tensor,
    each: tl.tensor,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
    SEARCH: tl.constexpr,
) -> None:
    group = tl.program_id(1)
    program = tl.program_id(2).to(tl.int64)
    begin = settled + tl.program_id(2) * each
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = (row < R) | WHOLE
    first = group.to(tl.int64) * (4 * PART)
    C = tl.minimum(K - group * (4 * PART), 4 * PART)
    grid = group.to(tl.int64) * R + row
    at = largest_ptr + group * largest_group_stride + row * largest_row_stride
    largest = tl.load(at, mask=live, other=1.0)
    scale = tl.load(scale_ptr + grid, mask=live, other=0.0)
    zero = tl.load(zero_ptr + grid, mask=live, other=0.0)
    zero = tl.where(scale > 0, zero, 0.0)
    base_scale = scale
    base_zero = zero
    best = tl.full((ROWS,), float("inf"), tl.float32)
    best_along = tl.zeros((ROWS,), tl.float32)
    best_square = tl.zeros((ROWS,), tl.float32)
    for i in range(begin + each):
        if (i < settled) | (i >= begin):
            kind = tl.load(kind_ptr + i)
            base_scale = tl.where(kind == 1, scale, base_scale)
            base_zero = tl.where(kind == 1, zero, base_zero)
            new_scale, new_zero = _grid_of(
                kind,
                tl.load(factor_ptr + i),
                tl.load(offset_ptr + i),
                base_scale,
                base_zero,
                scale,
                zero,
                best_along,
                best_square,
                largest,
            )
            if i < settled:
                loss = tl.load(loss_ptr + i * R + row, mask=live, other=0.0)
                along = best_along
                square = best_square
            else:
                loss, along, square = _loop(
                    w_ptr + first * w_stride + row,
                    w_stride,
                    u_ptr + first * u_stride,
                    u_stride,
                    reciprocal_ptr + first,
                    codes_ptr + first * out_stride + row,
                    t_ptr + row,
                    error_ptr + program * program_stride + first * out_stride + row,
                    parts_ptr + row,
                    out_stride,
                    live,
                    new_scale,
                    new_zero,
                    largest,
                    C,
                    kind >= 0,
                    (kind == 2) | (kind == 4),
                    kind == 3,
                    PART,
                    ROWS,
                    WHOLE,
                    SEARCH,
                )
                tl.store(loss_ptr + i * R + grid, loss, mask=live)
            better = ((loss < best) & (kind >= 0)) | (kind == 4)
            best = tl.where(better, loss, best)
            best_along = tl.where(better, along, best_along)
            best_square = tl.where(better, square, best_square)
            scale = tl.where(better, new_scale, scale)
            zero = tl.where(better, new_zero, zero)
        if i == settled - 1:
            base_scale = scale
            base_zero = zero
    if SEARCH and tl.load(kind_ptr + begin + each - 1) == 3:
        tl.store(scale_ptr + grid, scale, mask=live)
        tl.store(zero_ptr + grid, zero, mask=live)


class Candidates:
    """Grids tried around a starting one, as tensors on a device.

    first: (scale factor, zero steps) around the start; then: around the best of them; fits: times
    that the scale is fitted by least squares at last. Empty ones leave the start as it is.
    """

    def __init__(
        self,
        first: Sequence[tuple[float, float]],
        then: Sequence[tuple[float, float]],
        fits: int,
        device: torch.device,
    ) -> None:
        rows = [(1.0, 0.0, UNROUNDED)] * bool(fits) + [(*pair, AROUND) for pair in first]
        starts = [0, len(rows)]
        rows += [(*pair, AROUND if i else REBASE) for i, pair in enumerate(then)]
        starts.append(len(rows))
        rows += [(1.0, 0.0, MEASURE)] * bool(fits) + [(1.0, 0.0, FIT)] * fits
        rows += [(1.0, 0.0, LAST)]
        self.launches = [
            Launch(begin, 1, end - begin) for begin, end in pairwise(starts) if end > begin
        ]
        self.launches.append(Launch(starts[-1], len(rows) - starts[-1], 1))
        self.programs = max(launch.programs for launch in self.launches)
        table = torch.tensor(rows, dtype=torch.float32)
        self.steps = len(rows)
        self.factors, self.offsets = (table[:, i].contiguous().to(device) for i in (0, 1))
        self.kinds = table[:, 2].to(torch.int32).to(device)


class Launch(NamedTuple):
    """Steps that run side by side, `each` of them in a program, once `settled` ones have run."""

    settled: int
    each: int
    programs: int


class Scratch(NamedTuple):
    """Room for the visits of groups: loss f32 [steps, R], t f32 [128, R] and errors f32
    [programs, 128, R]."""

    loss: Tensor
    t: Tensor
    error: Tensor

    @classmethod
    def of(cls, candidates: Candidates, R: int) -> Scratch:
        """For R rows."""
        shapes = (candidates.steps, R), (GROUP_SIZE, R), (candidates.programs, GROUP_SIZE, R)
        return cls(*(torch.empty(shape, device=candidates.kinds.device) for shape in shapes))


def diagonal_blocks(U: Tensor) -> tuple[Tensor, Tensor]:
    """What the kernel reads of a factor U f32 [K, K]: f32 [G, 128, 128] and [G, 128].

    Each group's own block, transposed, its rows divided by their diagonal, and 1 / U_jj; filled up
    with zeros.
    """
    groups = -(-len(U) // GROUP_SIZE)
    padding = groups * GROUP_SIZE - len(U)
    shape = (groups, GROUP_SIZE)
    whole = functional.pad(U, (0, padding, 0, padding)) if padding else U
    blocks = whole.unflatten(1, shape).unflatten(0, shape).diagonal(dim1=0, dim2=2)
    diagonal = functional.pad(U.diagonal(), (0, padding), value=1.0).view(shape)
    reciprocals = functional.pad(U.diagonal().reciprocal(), (0, padding)).view(shape)
    return (blocks.permute(2, 1, 0) / diagonal[:, None]).contiguous(), reciprocals


def group_solve_triton(
    w: Tensor,
    unit: Tensor,
    reciprocal: Tensor,
    scale: Tensor,
    zero: Tensor,
    largest: Tensor,
    candidates: Candidates,
    codes: Tensor,
    parts: Tensor,
    scratch: Scratch,
) -> None:
    """Codes and errors of one group w f32 [C, R], columns first, on the best grid found.

    unit f32 [128, 128], reciprocal f32 [128]: the group's `diagonal_blocks`; largest: f32 [R]
    largest codes. scale, zero: f32 [R], the start, replaced by the grid found. Written: codes u8
    [C, R] and the errors as `split_product.right_parts`, bf16 [3 C, R]; in fp32 they stay at
    scratch.error[0]. Rows of w are contiguous, codes and parts as a whole.
    """
    tables = unit, reciprocal, scale, zero, largest[None]
    _launch(w, *tables, candidates, codes, parts, scratch, True)


def group_losses_triton(
    w: Tensor, U: Tensor, scale: Tensor, zero: Tensor, largest: Tensor
) -> Tensor:
    """Losses f32 [G, R] of all groups of w f32 [K, R], each on its own grid f32 [G, R].

    U: f32 [K, K], the factor.
    """
    loss = torch.empty_like(scale)
    start = Candidates([], [], 0, w.device)
    tables = *diagonal_blocks(U), scale, zero, largest
    error = torch.empty_like(w, memory_format=torch.contiguous_format)
    _launch(w, *tables, start, error, error, Scratch(loss, error, error[None]), False)
    return loss


def _launch(
    w: Tensor,
    unit: Tensor,
    reciprocal: Tensor,
    scale: Tensor,
    zero: Tensor,
    largest: Tensor,
    candidates: Candidates,
    codes: Tensor,
    parts: Tensor,
    scratch: Scratch,
    search: bool,
) -> None:
    K, R = w.shape
    loss, t, error = scratch
    blocks, groups = -(-R // ROWS_PER_PROGRAM), -(-K // GROUP_SIZE)
    for settled, each, programs in candidates.launches:
        _group_solve_kernel[(blocks, groups, programs)](
            w,
            unit,
            reciprocal,
            scale,
            zero,
            largest,
            candidates.factors,
            candidates.offsets,
            candidates.kinds,
            codes,
            t,
            error,
            parts,
            loss,
            R,
            K,
            w.stride(0),
            GROUP_SIZE,
            error.stride(1),
            error.stride(0),
            largest.stride(0),
            largest.stride(1),
            settled,
            each,
            PART=PART,
            ROWS=ROWS_PER_PROGRAM,
            WHOLE=K % PART == R % ROWS_PER_PROGRAM == 0,
            SEARCH=search,
            num_warps=1,
            num_stages=1,
        )
