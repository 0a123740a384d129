"""fp32 products in the tensor cores: three bf16 products with fp32 sums stand for one of fp32.

    a = a1 + a2,  a1 = bf16(a),  a2 = bf16(a - a1);    a b ~ a1 b1 + a1 b2 + a2 b1

(Henry, Tang, Heinecke 2019, arXiv 1904.06376, section 2). What is left out is 2^-16 of a term or
less, and differs in sign from term to term. The three are one product over 3 K terms, of
[a1, a1, a2] and [b1; b2; b1], so that the sum leaves the tensor cores once. bf16 has the range of
fp32: nothing below 3.38e38 overflows.

A factor that many products share is split once: `grouped_parts` splits the rows of every group on
their own, so that any run of groups is one run of rows. On the CPU a product is the plain one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitmill_kernels.layout import GROUP_SIZE

LOW_LEFT, LOW_RIGHT = 2, 1
"""Which of a factor's three parts is the low one."""


def split_product(left: Tensor, right: Tensor) -> Tensor:
    """left f32 [M, K] times right f32 [K, N], of any strides, as f32 [M, N]."""
    if not left.is_cuda or not len(left):
        return left @ right
    return parts_product(left_parts(left), right_parts(right))


def parts_product(left: Tensor, right: Tensor) -> Tensor:
    """Product f32 [M, N] of factors already split, bf16 [M, 3 K] and [3 K, N]."""
    if not left.is_cuda:
        return left.float() @ right.float()
    return torch.mm(left, right, out_dtype=torch.float32)


def subtract_parts(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Takes the product of factors already split off a contiguous total f32 [M, N], in place."""
    if not left.is_cuda:
        total -= parts_product(left, right)
        return
    torch.addmm(total, left, right, out_dtype=torch.float32, alpha=-1, out=total)


def left_parts(matrix: Tensor) -> Tensor:
    """bf16 [M, 3 K] of a left factor f32 [M, K]: high, high and low parts side by side."""
    return _stacked(matrix.T, LOW_LEFT).T


def right_parts(matrix: Tensor) -> Tensor:
    """bf16 [3 K, N] of a right factor f32 [K, N]: high, low and high parts, one below the other."""
    return _stacked(matrix, LOW_RIGHT)


def grouped_parts(matrix: Tensor, low: int, out: Tensor | None = None) -> Tensor:
    """bf16 [3 K, N] of f32 [K, N], each group of 128 rows (the tail is shorter) split on its own.

    low: LOW_RIGHT, or LOW_LEFT where the transpose of the parts is a left factor. They are written
    to `out` where it is given.
    """
    K, N = matrix.shape
    whole = K - K % GROUP_SIZE
    parts = out
    if parts is None:
        parts = torch.empty(3 * K, N, dtype=torch.bfloat16, device=matrix.device)
    for rows, size in ((slice(0, whole), GROUP_SIZE), (slice(whole, K), K - whole)):
        if rows.start < rows.stop:
            piece = parts[3 * rows.start : 3 * rows.stop].view(-1, 3, size, N)
            _split(matrix[rows].unflatten(0, (-1, size)), piece.unbind(1), low)
    return parts


def _stacked(matrix: Tensor, low: int) -> Tensor:
    """bf16 [3 K, N] of f32 [K, N]; rows or columns are contiguous, as they were."""
    K, N = matrix.shape
    flipped = matrix.stride(0) < matrix.stride(1)
    shape = (N, 3, K) if flipped else (3, K, N)
    parts = torch.empty(shape, dtype=torch.bfloat16, device=matrix.device)
    _split(matrix, (parts.permute(1, 2, 0) if flipped else parts).unbind(), low)
    return parts.view(N, 3 * K).T if flipped else parts.view(3 * K, N)


def _split(matrix: Tensor, parts: Sequence[Tensor], low: int) -> None:
    """Writes the parts of f32 [...] to three bf16 tensors of the same shape."""
    high, twin = (part for i, part in enumerate(parts) if i != low)
    high.copy_(matrix)
    twin.copy_(high)
    torch.sub(matrix, high, out=parts[low])
