"""Codes and grids of one linear while they are still being refined.

    ŵ[n, k] = scales[g, n] * (codes[n, k] - zeros[g, n]),   g the group of packed column k

Everything lives on the device of the weights, in packed (ordered) columns; zeros are real numbers
in codes, not the stored integers. `finish` turns the result into the checked `QuantizedWeight`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from bitmill.quant.grid import Grid, max_code, stored_zeros
from bitmill.quant.tensors import QuantizedWeight
from bitmill_kernels.layout import GROUP_SIZE, group_columns


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

    @classmethod
    def nearest(cls, W: Tensor, grid: Grid, widths: tuple[int, ...]) -> LinearCodes:
        """The nearest codes of W f32 [N, K] on the grids [G, N] of its groups."""
        live = grid.scale > 0
        inverse = torch.where(live, 1.0 / grid.scale, 0.0)
        result = cls(W, grid.scale, torch.where(live, grid.zero, 0.0), widths)
        columns = W.shape[1]
        codes = W * per_column(inverse, columns)
        codes.add_(per_column(result.zeros, columns)).round_().clamp_(min=0.0)
        codes = torch.minimum(codes, per_column(result.largest(), columns)).to(torch.uint8)
        return cls(codes, result.scales, result.zeros, widths)

    def rows(self, part: slice) -> LinearCodes:
        """Some of the rows."""
        return LinearCodes(self.codes[part], self.scales[:, part], self.zeros[:, part], self.widths)

    def groups(self) -> Iterator[tuple[int, slice]]:
        """Group numbers with their columns."""
        return group_slices(self.codes.shape[1])

    def values(self) -> Tensor:
        """ŵ f32 [N, K]."""
        columns = self.codes.shape[1]
        steps = self.codes - per_column(self.zeros, columns)
        return steps.mul_(per_column(self.scales, columns))

    def largest(self) -> Tensor:
        """Largest codes, f32 [G, N]; a view of one number per group."""
        top = torch.tensor([float(max_code(width)) for width in self.widths])
        return top.to(self.scales.device, non_blocking=True)[:, None].expand_as(self.scales)

    def finish(self) -> QuantizedWeight:
        """The checked form, on the same device, without rewrites."""
        return QuantizedWeight(
            self.codes,
            self.scales.to(torch.float16),
            stored_zeros(self.zeros, self.widths),
            self.widths,
        )


def row_slices(matrices: Sequence[Tensor]) -> list[slice]:
    """The rows of each matrix [N_i, *] where all stand one below the other."""
    ends = list(accumulate(map(len, matrices)))
    return [slice(end - len(matrix), end) for matrix, end in zip(matrices, ends, strict=True)]


def stacked_largest(
    widths: Sequence[tuple[int, ...]], rows: Sequence[slice], device: torch.device
) -> Tensor:
    """Largest codes f32 [G, N] of linears that stand one below the other."""
    tops = torch.tensor([[float(max_code(width)) for width in own] for own in widths])
    tops = tops.to(device, non_blocking=True)
    counts = [mine.stop - mine.start for mine in rows]
    return torch.cat([top[:, None].expand(-1, n) for top, n in zip(tops, counts, strict=True)], 1)


def per_column(grid: Tensor, columns: int) -> Tensor:
    """f32 [N, K] from one value per group and row, [G, N]."""
    return grid.T.repeat_interleave(GROUP_SIZE, 1, output_size=GROUP_SIZE * len(grid))[:, :columns]


def group_slices(columns: int) -> Iterator[tuple[int, slice]]:
    """Numbers and column slices of the groups of K columns, the tail last."""
    start = 0
    for group, count in enumerate(group_columns(columns)):
        yield group, slice(start, start + count)
        start += count


def output_error(residual: Tensor, H: Tensor) -> float:
    """tr(R H R^T) of a residual R f32 [N, K]: the mean squared output error, summed over rows."""
    return float(row_errors(residual, H).sum())


def row_errors(residual: Tensor, H: Tensor) -> Tensor:
    """The terms of `output_error`, one per row, f64 [N] on the device.

    On CUDA the product takes TF32: roundings of 2^-11 in single terms, which average out.
    """
    with _tf32(residual.device):
        product = residual @ H
    return (product * residual).sum(1, dtype=torch.float64)


@contextmanager
def _tf32(device: torch.device) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
