"""Codes and grids of one linear while they are still being refined.

    ŵ[n, k] = scales[g, n] * (codes[n, k] - zeros[g, n]),   g the group of packed column k

Everything lives on the device of the weights, in packed (ordered) columns; zeros are real numbers
in codes, not the stored integers. `finish` turns the result into the checked `QuantizedWeight`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bitmill.grid import Grid, stored_zero, values
from bitmill.packed import QuantizedWeight
from bitmill_kernels.layout import group_columns


@dataclass(frozen=True, eq=False)
class LinearCodes:
    """codes u8 [N, K], scales f32 [G, N] exact in fp16, zeros f32 [G, N], one width per group."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    widths: tuple[int, ...]

    @classmethod
    def join(cls, codes: list[Tensor], grids: list[Grid], widths: tuple[int, ...]) -> LinearCodes:
        """From per-group codes [N, c] and grids."""
        return cls(
            torch.cat([c.to(torch.uint8) for c in codes], 1),
            torch.stack([grid.scale for grid in grids]),
            torch.stack([grid.zero for grid in grids]),
            widths,
        )

    def grid(self, group: int) -> Grid:
        """The grid of one group."""
        return Grid(self.scales[group], self.zeros[group])

    def groups(self) -> Iterator[tuple[int, slice]]:
        """Group numbers with their columns."""
        return group_slices(self.codes.shape[1])

    def values(self) -> Tensor:
        """ŵ f32 [N, K]."""
        parts = [values(self.codes[:, part], self.grid(g)) for g, part in self.groups()]
        return torch.cat(parts, 1)

    def finish(self, order: Tensor | None) -> QuantizedWeight:
        """The stored form, on the CPU; order is i64 [K], or None for natural order."""
        zeros = [
            stored_zero(zero, width) for zero, width in zip(self.zeros, self.widths, strict=True)
        ]
        return QuantizedWeight(
            self.codes.cpu(),
            self.scales.to(torch.float16).cpu(),
            torch.stack(zeros).cpu(),
            self.widths,
            None if order is None else order.to(torch.int32).cpu(),
        )


def group_slices(columns: int) -> Iterator[tuple[int, slice]]:
    """Numbers and column slices of the groups of K columns, the tail last."""
    start = 0
    for group, count in enumerate(group_columns(columns)):
        yield group, slice(start, start + count)
        start += count


def output_error(residual: Tensor, H: Tensor) -> float:
    """tr(R H R^T) of a residual R f32 [N, K]: the mean squared output error, summed over rows."""
    return float(((residual @ H) * residual).sum(dtype=torch.float64))
