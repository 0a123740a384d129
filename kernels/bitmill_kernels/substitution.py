"""Triangular solves and inverses, block by block, so that most of the work is products.

    L L^T x = b:   L y = b downwards, then L^T x = y upwards
    L X = 1:       X_ii = L_ii^-1,  X_ij = -L_ii^-1 sum_k<i L_ik X_kj

The diagonal blocks of 1024 rows are inverted in fp32 once, so that a block is solved by one split
product (`split_product.py`) and taken out of the rows to come by another. An inverse, whose errors
grow with the condition of L, takes fp32 products instead. Substitution by the vendor's library runs
at a fraction of a product's speed. On the CPU LAPACK does both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bitmill_kernels.split_product import (
    left_parts,
    right_parts,
    split_product,
    subtract_parts,
)

BLOCK = 1024


def cholesky_solver(lower: Tensor) -> Callable[[Tensor], Tensor]:
    """Gives x f32 [K, N] with L L^T x = right f32 [K, N], for L f32 [K, K] lower triangular."""
    if lower.is_cuda:
        return Substitution(lower)

    def solve(right: Tensor) -> Tensor:
        return torch.cholesky_solve(right, lower)

    return solve


def lower_inverse(lower: Tensor) -> Tensor:
    """The inverse f32 [K, K] of L f32 [K, K], lower triangular."""
    if lower.is_cuda:
        return invert(lower)
    return _inverted(lower)


class Substitution:
    """`cholesky_solver` in blocks, on any device."""

    def __init__(self, lower: Tensor, block: int = BLOCK) -> None:
        self._lower = lower
        self._parts = _parts(len(lower), block)
        self._inverses = [_inverted(lower[part, part]) for part in self._parts]

    def __call__(self, right: Tensor) -> Tensor:
        x, lower = right.clone(memory_format=torch.contiguous_format), self._lower
        solved = list(zip(self._parts, self._inverses, strict=True))
        for part, inverse in solved:
            rest = slice(part.stop, len(lower))
            x[part] = split_product(inverse, x[part])
            if rest.start < rest.stop:
                subtract_parts(x[rest], left_parts(lower[rest, part]), right_parts(x[part]))
        for part, inverse in reversed(solved):
            rest = slice(0, part.start)
            x[part] = split_product(inverse.T, x[part])
            if rest.stop:
                subtract_parts(x[rest], left_parts(lower[part, rest].T), right_parts(x[part]))
        return x


def invert(lower: Tensor, block: int = BLOCK) -> Tensor:
    """`lower_inverse` in blocks, on any device."""
    x = torch.zeros(lower.shape, dtype=lower.dtype, device=lower.device)
    for part in _parts(len(lower), block):
        before, done, rest = slice(0, part.start), slice(0, part.stop), slice(part.stop, len(x))
        inverse = _inverted(lower[part, part])
        x[part, part] = inverse
        if before.stop:
            x[part, before] = inverse @ x[part, before]
        if rest.start < rest.stop:
            x[rest, done] -= lower[rest, part] @ x[part, done]
    return x


def _parts(count: int, block: int) -> list[slice]:
    return [slice(start, min(start + block, count)) for start in range(0, count, block)]


def _inverted(lower: Tensor) -> Tensor:
    eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
    return inverse
