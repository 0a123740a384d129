"""The divergence of `divergence.py` as one Triton kernel, a single pass over both tensors.

A program walks along one row. Every lane keeps the largest log p + d it has met and the sum of
exponentials relative to it; the lanes are joined at the end of the row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 1024
LOWEST = tl.constexpr(-3.0e38)  # finite, so a lane without a value never takes inf from inf


@triton.jit
def _divergence_kernel(
    source_ptr: tl.tensor,
    change_ptr: tl.tensor,
    result_ptr: tl.tensor,
    N: tl.tensor,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    source_ptr += row * N
    change_ptr += row * N
    column = tl.arange(0, COLUMNS)
    top = tl.full((COLUMNS,), LOWEST, tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    mean = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, N, COLUMNS):
        live = column < N - start
        log_p = tl.load(source_ptr + start + column, mask=live, other=-float("inf"))
        change = tl.load(change_ptr + start + column, mask=live, other=0.0)
        mean += tl.exp(log_p) * change
        moved = log_p + change
        higher = tl.maximum(top, moved)
        total = total * tl.exp(top - higher) + tl.exp(moved - higher)
        top = higher
    peak = tl.max(top, axis=0)
    total = tl.sum(total * tl.exp(top - peak), axis=0)
    tl.store(result_ptr + row, peak + tl.log(total) - tl.sum(mean, axis=0))


def divergence_triton(source: Tensor, change: Tensor) -> Tensor:
    """f32 [T] from f32 [T, N], both contiguous."""
    result = torch.empty(len(source), dtype=torch.float32, device=source.device)
    if len(source):
        _divergence_kernel[(len(source),)](
            source, change, result, source.shape[1], COLUMNS=COLUMNS, num_warps=4
        )
    return result
