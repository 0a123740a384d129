"""fp32 products in the tensor cores: three bf16 products with fp32 sums stand for one of fp32.

    a = a1 + a2,  a1 = bf16(a),  a2 = bf16(a - a1);    a b ~ a1 b1 + a1 b2 + a2 b1

(Henry, Tang, Heinecke 2019, arXiv 1904.06376, section 2). What is left out is 2^-16 of a term or
less, and differs in sign from term to term. The three are one product over 3 K terms, of
[a1, a1, a2] and [b1; b2; b1], so that the sum leaves the tensor cores once. bf16 has the range of
fp32: nothing below 3.38e38 overflows.

On the CPU a product is the plain one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split_product(left: Tensor, right: Tensor) -> Tensor:
    """left f32 [M, K] times right f32 [K, N], of any strides, as f32 [M, N]."""
    if not left.is_cuda:
        return left @ right
    return torch.mm(left_parts(left), right_parts(right), out_dtype=torch.float32)


def left_parts(matrix: Tensor) -> Tensor:
    """bf16 [M, 3 K] of a left factor f32 [M, K]: high, high and low parts side by side."""
    return right_parts(matrix.T, low=2).T


def right_parts(matrix: Tensor, low: int = 1) -> Tensor:
    """bf16 [3 K, N] of a right factor f32 [K, N]: high, low and high parts one below the other.

    low: which of the three is the low part. Rows or columns are contiguous as they were.
    """
    K, N = matrix.shape
    flipped = matrix.stride(0) < matrix.stride(1)
    shape = (N, 3, K) if flipped else (3, K, N)
    parts = torch.empty(shape, dtype=torch.bfloat16, device=matrix.device)
    stacked = parts.permute(1, 2, 0) if flipped else parts
    high, twin = (stacked[i] for i in range(3) if i != low)
    high.copy_(matrix)
    twin.copy_(high)
    torch.sub(matrix, high, out=stacked[low])
    return parts.view(N, 3 * K).T if flipped else parts.view(3 * K, N)
