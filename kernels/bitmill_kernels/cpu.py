"""Packed linears on a CPU: a tile of rows is dequantized into the cache, multiplied, dropped.

    y[:, rows] = x[:, order] @ dequantize(rows)^T

Nothing beyond the stored planes stays in memory: a tile holds at most `TILE_ELEMENTS` fp32
weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitmill_kernels.pack import unpack_codes
from bitmill_kernels.reference import dequantize
from bitmill_kernels.runtime import PackedWeight

TILE_ELEMENTS = 1 << 18


class CpuProduct:
    """The product of `linear.py` on the stored planes, one linear of the stack after the other."""

    def __init__(self, weights: Sequence[PackedWeight], device: torch.device) -> None:
        self._linears = [_StoredLinear(weight, device) for weight in weights]

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """y [T, N] of x [T, K]."""
        order = self._linears[0].order
        inputs = x if order is None else x.index_select(1, order)
        parts = [linear(inputs) for linear in self._linears]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return y if bias is None else y + bias


class _StoredLinear:
    def __init__(self, weight: PackedWeight, device: torch.device) -> None:
        self._weight = weight
        self._tensors = {name: tensor.to(device) for name, tensor in weight.tensors.items()}
        self._scales = self._tensors["scales"]
        self._zeros = weight.zeros().to(device)
        self.order = None if weight.order is None else weight.order.to(device)

    def __call__(self, x: Tensor) -> Tensor:
        N, K = self._weight.N, self._weight.K
        rows = max(1, TILE_ELEMENTS // K)
        y = torch.empty(x.shape[0], N, dtype=x.dtype, device=x.device)
        inputs = x.float()
        for first in range(0, N, rows):
            tile = self._dequantize_rows(first, min(N, first + rows))
            y[:, first : first + tile.shape[0]] = inputs @ tile.t()
        return y

    def _dequantize_rows(self, first: int, end: int) -> Tensor:
        """Weights f32 [end - first, K] in packed column order."""
        widths, K = self._weight.widths, self._weight.K
        planes = {
            name: tensor[:, first:end] if name.startswith("codes") else tensor[first:end]
            for name, tensor in self._tensors.items()
            if name.startswith(("codes", "tail"))
        }
        codes = unpack_codes(planes, widths, end - first, K)
        return dequantize(codes, self._scales[:, first:end], self._zeros[:, first:end], widths)
