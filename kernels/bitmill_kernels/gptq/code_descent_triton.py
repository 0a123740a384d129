"""The code descent of one group as one Triton kernel: a tile of rows stays in registers.

Same equation as `code_descent.py`, looking right: codes and slopes are read once, every column
takes its step and spreads it over the columns after it, then codes and changes are written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS_PER_PROGRAM = 8


@triton.jit
def _descend_block_kernel(
    codes_ptr: tl.tensor,
    slope_ptr: tl.tensor,
    h_ptr: tl.tensor,
    curvature_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    new_ptr: tl.tensor,
    change_ptr: tl.tensor,
    R: tl.tensor,
    C: tl.tensor,
    codes_stride: tl.tensor,
    slope_stride: tl.tensor,
    h_stride: tl.tensor,
    max_code: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    row_live = row < R
    live = row_live[:, None] & (column[None, :] < C)
    row64 = row.to(tl.int64)[:, None]
    codes = tl.load(codes_ptr + row64 * codes_stride + column[None, :], mask=live, other=0)
    codes = codes.to(tl.float32)
    slope = tl.load(slope_ptr + row64 * slope_stride + column[None, :], mask=live, other=0.0)
    scale = tl.load(scale_ptr + row, mask=row_live, other=0.0)
    inverse = tl.load(inverse_ptr + row, mask=row_live, other=0.0)
    change = tl.zeros((ROWS, COLUMNS), tl.float32)
    for j in range(C):
        here = column[None, :] == j
        old = tl.sum(tl.where(here, codes, 0.0), axis=1)
        g = tl.sum(tl.where(here, slope, 0.0), axis=1)
        new = old + g * inverse * tl.load(curvature_ptr + j)
        new = tl.minimum(tl.maximum(new, 0.0), max_code)
        new = (new + 12582912.0) - 12582912.0
        step = (new - old) * scale
        codes = tl.where(here, new[:, None], codes)
        change = tl.where(here, step[:, None], change)
        h = tl.load(h_ptr + j * h_stride + column, mask=(column > j) & (column < C), other=0.0)
        slope -= step[:, None] * h[None, :]
    out = row64 * C + column[None, :]
    tl.store(new_ptr + out, codes.to(tl.uint8), mask=live)
    tl.store(change_ptr + out, change, mask=live)


def descend_block_triton(
    codes: Tensor,
    slope: Tensor,
    H: Tensor,
    curvature: Tensor,
    scale: Tensor,
    inverse: Tensor,
    max_code: int,
) -> tuple[Tensor, Tensor]:
    """Arguments as in `code_descent.descend_block`, plus f32 [C] 1/H_jj and f32 [R] 1/scale."""
    codes = codes if codes.stride(1) == 1 else codes.contiguous()
    slope = slope if slope.stride(1) == 1 else slope.contiguous()
    H = H if H.stride(1) == 1 else H.contiguous()
    R, C = codes.shape
    new = torch.empty(R, C, dtype=torch.uint8, device=codes.device)
    change = torch.empty(R, C, dtype=torch.float32, device=codes.device)
    _descend_block_kernel[(triton.cdiv(R, ROWS_PER_PROGRAM),)](
        codes,
        slope,
        H,
        curvature.contiguous(),
        scale.contiguous(),
        inverse.contiguous(),
        new,
        change,
        R,
        C,
        codes.stride(0),
        slope.stride(0),
        H.stride(0),
        float(max_code),
        ROWS=ROWS_PER_PROGRAM,
        COLUMNS=triton.next_power_of_2(C),
        num_warps=1,
    )
    return new, change
