"""Triangular solves and inverses, block by block, so that most of the work is products.

    L L^T x = b:   L y = b downwards, then L^T x = y upwards
    L X = 1:       X_ii = L_ii^-1,  X_ij = -L_ii^-1 sum_k<i L_ik X_kj

The diagonal blocks of 1024 rows are inverted in fp32 once, so that a block is solved by one split
product (`split_product.py`) and taken out of the rows to come by another. An inverse, whose errors
grow with the condition of L, takes fp32 products instead. Substitution by the vendor's library runs
at a fraction of a product's speed, so of the diagonal blocks too it inverts only tiles of 64 rows;
tiles of twice the size follow from them, those of all blocks at once:

    [A 0; B C]^-1 = [A^-1 0; -C^-1 B A^-1 C^-1]

On the CPU LAPACK does both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bitmill_kernels.linalg.split_product import (
    left_parts,
    right_parts,
    split_product,
    subtract_parts,
)

BLOCK = 1024
TILE = 64


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
        self._inverses = _diagonal_inverses(lower, self._parts)

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
    parts = _parts(len(lower), block)
    for part, inverse in zip(parts, _diagonal_inverses(lower, parts), strict=True):
        before, done, rest = slice(0, part.start), slice(0, part.stop), slice(part.stop, len(x))
        x[part, part] = inverse
        if before.stop:
            x[part, before] = inverse @ x[part, before]
        if rest.start < rest.stop:
            x[rest, done] -= lower[rest, part] @ x[part, done]
    return x


def _parts(count: int, block: int) -> list[slice]:
    return [slice(start, min(start + block, count)) for start in range(0, count, block)]


def _diagonal_inverses(lower: Tensor, parts: Sequence[slice]) -> list[Tensor]:
    """The inverses of the diagonal blocks of L f32 [K, K]."""
    sizes = [part.stop - part.start for part in parts]
    whole = TILE
    while whole < max(sizes):
        whole *= 2
    x = torch.eye(whole, device=lower.device).repeat(len(parts), 1, 1)
    for mine, part, size in zip(x, parts, sizes, strict=True):
        mine[:size, :size] = lower[part, part]
    tiles = _tiles(x, TILE)
    tiles.copy_(_inverted(tiles))
    size = TILE
    while size < whole:
        pairs = _tiles(x, 2 * size)
        first, second = pairs[..., :size, :size], pairs[..., size:, size:]
        below = pairs[..., size:, :size]
        below.copy_((second @ below @ first).neg_())
        size *= 2
    return [mine[:size, :size] for mine, size in zip(x, sizes, strict=True)]


def _tiles(blocks: Tensor, size: int) -> Tensor:
    """The diagonal tiles of blocks [P, B, B], a view [P, B / size, size, size]."""
    P, B, _ = blocks.shape
    grid = blocks.view(P, B // size, size, B // size, size)
    return grid.diagonal(dim1=1, dim2=3).movedim(3, 1)


def _inverted(lower: Tensor) -> Tensor:
    """The inverses of L [..., K, K], lower triangular."""
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    return inverse
