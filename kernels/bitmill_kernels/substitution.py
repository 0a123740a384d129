"""Solving with a Cholesky factor, block by block, so that most of the work is products.

    L L^T x = b:   L y = b downwards, then L^T x = y upwards

A block of 1024 unknowns is solved in fp32 and taken out of all those to come by one split product
(`split_product.py`). Substitution by the vendor's library runs at a fraction of a product's speed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitmill_kernels.split_product import left_parts, right_parts, subtract_parts

BLOCK = 1024


def cholesky_solve(lower: Tensor, right: Tensor) -> Tensor:
    """x f32 [K, N] with L L^T x = right f32 [K, N], for L f32 [K, K] lower triangular."""
    return substitute(lower, right) if right.is_cuda else torch.cholesky_solve(right, lower)


def substitute(lower: Tensor, right: Tensor, block: int = BLOCK) -> Tensor:
    """As `cholesky_solve`, in blocks on any device."""
    x = right.clone(memory_format=torch.contiguous_format)
    starts = range(0, len(lower), block)
    for start in starts:
        part, rest = slice(start, start + block), slice(start + block, len(lower))
        x[part] = torch.linalg.solve_triangular(lower[part, part], x[part], upper=False)
        if rest.start < rest.stop:
            subtract_parts(x[rest], left_parts(lower[rest, part]), right_parts(x[part]))
    for start in reversed(starts):
        part, rest = slice(start, start + block), slice(0, start)
        x[part] = torch.linalg.solve_triangular(lower[part, part].T, x[part], upper=True)
        if start:
            subtract_parts(x[rest], left_parts(lower[part, rest].T), right_parts(x[part]))
    return x
