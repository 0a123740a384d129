"""The GPTQ block as one Triton kernel: a tile of rows stays in registers for all its columns.

Same equation as `block.py`, looking right: the tile [rows, columns] is read once, every column
is quantized and its error spread over the columns after it, then codes and errors are written
once. The largest code is a run-time number, so one compiled kernel serves every width.

Rounding to the nearest even integer adds and subtracts 1.5 * 2^23, after the value is clamped
to the code range, where it is exact. The column loop stays rolled: unrolled it compiles for
minutes. A warp per 8 rows gave the fewest instructions per weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS_PER_PROGRAM = 8


@triton.jit
def _gptq_block_kernel(
    w_ptr: tl.tensor,
    u_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    error_ptr: tl.tensor,
    R: tl.tensor,
    C: tl.tensor,
    w_stride: tl.tensor,
    u_stride: tl.tensor,
    max_code: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    row_live = row < R
    live = row_live[:, None] & (column[None, :] < C)
    row64 = row.to(tl.int64)
    w = tl.load(w_ptr + row64[:, None] * w_stride + column[None, :], mask=live, other=0.0)
    scale = tl.load(scale_ptr + row, mask=row_live, other=0.0)
    inverse = tl.load(inverse_ptr + row, mask=row_live, other=0.0)
    zero = tl.load(zero_ptr + row, mask=row_live, other=0.0)
    codes = tl.zeros((ROWS, COLUMNS), tl.float32)
    error = tl.zeros((ROWS, COLUMNS), tl.float32)
    for j in range(C):
        here = column[None, :] == j
        value = tl.sum(tl.where(here, w, 0.0), axis=1)
        code = tl.minimum(tl.maximum(value * inverse + zero, 0.0), max_code)
        code = (code + 12582912.0) - 12582912.0
        missed = value - (code - zero) * scale
        codes = tl.where(here, code[:, None], codes)
        error = tl.where(here, missed[:, None], error)
        u = tl.load(u_ptr + j * u_stride + column, mask=(column > j) & (column < C), other=0.0)
        w -= missed[:, None] * u[None, :]
    out = row64[:, None] * C + column[None, :]
    tl.store(codes_ptr + out, codes.to(tl.uint8), mask=live)
    tl.store(error_ptr + out, error, mask=live)


def gptq_block_triton(
    w: Tensor, u: Tensor, scale: Tensor, inverse: Tensor, zero: Tensor, max_code: int
) -> tuple[Tensor, Tensor]:
    """Arguments as in `gptq.gptq_block`, plus inverse f32 [R] = 1/scale, or 0 where scale is 0."""
    w = w if w.stride(1) == 1 else w.contiguous()
    u = u if u.stride(1) == 1 else u.contiguous()
    R, C = w.shape
    codes = torch.empty(R, C, dtype=torch.uint8, device=w.device)
    error = torch.empty(R, C, dtype=torch.float32, device=w.device)
    _gptq_block_kernel[(triton.cdiv(R, ROWS_PER_PROGRAM),)](
        w,
        u,
        scale.contiguous(),
        inverse.contiguous(),
        zero.contiguous(),
        codes,
        error,
        R,
        C,
        w.stride(0),
        u.stride(0),
        float(max_code),
        ROWS=ROWS_PER_PROGRAM,
        COLUMNS=triton.next_power_of_2(C),
        num_warps=1,
    )
    return codes, error
