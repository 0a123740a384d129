"""Rotation of a linear's columns inside their groups: signs, then a Hadamard matrix.

    x' = R x,  W' = W R^T        R = H S in every group of 128 columns, R^T R = 1

S is a diagonal of signs, which follow from the number of a column; H is Sylvester's matrix over
sqrt(128). A shorter last group of c columns is cut into the largest powers of two: 100 = 64 + 32 +
4. Weights of a group become nearly Gaussian and alike, and groups stay apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Self

import torch
from torch import Tensor

from bitmill.quant.rewrites import Rewrite, Rewrites
from bitmill_kernels.layout import GROUP_SIZE


@dataclass(frozen=True)
class Rotation(Rewrite):
    """The rotation; nothing of it is stored.

    first: number of the first column, a multiple of 128: not 0 for a part of a linear's groups.
    """

    first: int = 0
    name: ClassVar[str] = "rotation"
    stored: ClassVar[tuple[str, ...]] = ()

    def weights(self, W: Tensor) -> Tensor:
        return rotate(W, self.first)

    def undo(self, W: Tensor) -> Tensor:
        return _turn(W) * _signs_of(W, self.first)

    def inputs(self, x: Tensor) -> Tensor:
        return rotate(x, self.first)

    def moments(self, sums: Tensor) -> Tensor:
        return rotate(sums, self.first)

    def tensors(self) -> dict[str, Tensor]:
        return {}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        return cls()

    def check(self, name: str, N: int, K: int) -> None:
        """It fits every linear."""


def packed_rewrites(code: str, order: Tensor | None, first: int = 0) -> Rewrites:
    """What leads to the columns of a packed linear: its column order i32 [K], and for trellis codes
    the rotation of columns from `first` on."""
    ordered = Rewrites.of_order(order)
    return Rewrites([*ordered, Rotation(first)]) if code == "trellis" else ordered


def rotate(x: Tensor, first: int = 0) -> Tensor:
    """Rows of x [..., K], rotated, in the dtype of x; `first` as in `Rotation`."""
    return _turn(x * _signs_of(x, first))


def _signs_of(x: Tensor, first: int) -> Tensor:
    return signs(first + x.shape[-1], x.device)[first:].to(x.dtype)


@cache
def signs(K: int, device: torch.device) -> Tensor:
    """1 or -1 for each of K columns, f32 [K]: bit 31 of a hash of the column's number."""
    h = torch.arange(1, K + 1) * 0x9E3779B1 & 0xFFFFFFFF
    h = (h ^ h >> 15) * 0x85EBCA77 & 0xFFFFFFFF
    return (1 - 2 * (h >> 31)).float().to(device)


def _turn(x: Tensor) -> Tensor:
    """x [..., K] times the symmetric Hadamard matrices of its parts."""
    full = x.shape[-1] // GROUP_SIZE * GROUP_SIZE
    turned = []
    if full:
        groups = x[..., :full].unflatten(-1, (-1, GROUP_SIZE))
        if x.device.type == "cpu":
            groups = groups.contiguous()  # else a product of its own for every row
        turned.append((groups @ _hadamard(GROUP_SIZE, x.device, x.dtype)).flatten(-2))
    for part in _tail_parts(full, x.shape[-1]):
        turned.append(x[..., part] @ _hadamard(part.stop - part.start, x.device, x.dtype))
    return torch.cat(turned, -1)


def _tail_parts(start: int, end: int) -> Iterator[slice]:
    """Columns of the powers of two that a tail is cut into, the largest first."""
    while start < end:
        size = 1 << (end - start).bit_length() - 1
        yield slice(start, start + size)
        start += size


@cache
def _hadamard(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Sylvester's matrix over sqrt(size), [size, size]."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    found: Tensor = matrix / size**0.5
    return found.to(device, dtype)
