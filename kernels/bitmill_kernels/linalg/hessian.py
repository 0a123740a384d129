"""Accumulation of second moments, H += x^T diag(weight) x and others, fp32 sums, never TF32.

bf16 and fp16 inputs on CUDA multiply in the tensor cores with fp32 output: their products are
exact in fp32. Where tokens of such inputs are weighted, inputs times the root of the weight are
rounded to bf16 first, which moves H by about 1e-6 of its diagonal. The
factor 2/T of the paper (arXiv 2210.17323, section 3) is left to the caller: scale once at the
end, not once per batch. Large H are symmetric halves: below the diagonal only what shares a block
of columns with it is added, which leaves out three eighths of the operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from bitmill_kernels.layout import GROUP_SIZE, group_count

FP32_CHUNK_TOKENS = 8192
WHOLE_COLUMNS = 2047
"""Up to so many columns, H is summed as a whole, in one product."""

COLUMN_BLOCKS = 4

HALVES = (torch.bfloat16, torch.float16)


def hessian_update(H: Tensor, x: Tensor, weight: Tensor | None = None) -> None:
    """Add the inputs x [T, K] (bf16, fp16 or f32), weighted f32 [T], to H f32 [K, K] in place.

    Only the upper triangle is whole after it, with the diagonal: mirror it before use.
    """
    if weight is not None and x.is_cuda and x.dtype in HALVES:
        scaled = torch.empty_like(x, dtype=torch.bfloat16)
        hessian_update(H, torch.mul(x, weight.sqrt()[:, None], out=scaled))
        return
    if H.shape != (x.shape[1], x.shape[1]) or x.shape[1] <= WHOLE_COLUMNS:
        cross_update(H, x, x, weight)
        return
    for columns in column_blocks(x.shape[1]):
        above = slice(0, columns.stop)
        cross_update(H[above, columns], x[:, above], x[:, columns], weight)


def column_blocks(K: int) -> list[slice]:
    """Blocks of whole groups of columns, of like widths, that make up K columns."""
    width = -(-group_count(K) // COLUMN_BLOCKS) * GROUP_SIZE
    return [slice(start, min(start + width, K)) for start in range(0, K, width)]


def cross_update(C: Tensor, left: Tensor, right: Tensor, weight: Tensor | None = None) -> None:
    """Add left^T diag(weight) right to C f32 [M, K]: left [T, M], right [T, K], weight f32 [T]."""
    shape = (left.shape[1], right.shape[1])
    if C.dtype != torch.float32 or C.shape != shape or len(left) != len(right):
        raise ValueError(
            f"the sum is {C.dtype} {tuple(C.shape)} for inputs {tuple(left.shape)} and "
            f"{tuple(right.shape)}: give float32 {list(shape)} and as many tokens on both sides"
        )
    if weight is None and left.is_cuda and left.dtype == right.dtype and left.dtype in HALVES:
        add_product(C, left.t(), right)
        return
    with _exact_fp32():
        for start in range(0, left.shape[0], FP32_CHUNK_TOKENS):
            part = slice(start, start + FP32_CHUNK_TOKENS)
            rows = right[part].float()
            factor = rows if left is right else left[part].float()
            if weight is not None:
                factor = factor * weight[part, None].float()
            C.addmm_(factor.t(), rows)


def product(left: Tensor, right: Tensor) -> Tensor:
    """left [T, K] times right [K, N], both of one dtype, as f32 [T, N] with fp32 sums."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left [T, K] times right [K, N], both of one dtype, to total f32 [T, N] in place."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())


@contextmanager
def _exact_fp32() -> Iterator[None]:
    """Hold torch's fp32 matmul precision at full fp32, whatever the process has chosen."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
