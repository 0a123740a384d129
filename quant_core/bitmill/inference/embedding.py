"""An embedding that stays packed, and the head that is tied to it.

    embedding  y[t] = w[id[t]]                   w [V, D] as in `bitmill.inference.linear`
    tied head  y[t, v] = sum_k x[t, k] w[v, k]

A lookup dequantizes the rows that are asked for, nothing else. A tied head owns no tensors: it
multiplies with the embedding's, so a checkpoint holds them once. Given up: on an accelerator a tied
matrix lies there twice, as planes for lookups and in the layout of the products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from bitmill.inference.linear import QuantizedLinear
from bitmill_kernels.pack import unpack_codes, unpack_zeros
from bitmill_kernels.reference import dequantize


class QuantizedEmbedding(QuantizedLinear):
    """Packed embedding of V = `out_features` rows of D = `in_features` columns.

    multiplier: what every looked-up row is multiplied by (some models scale their embeddings).
    Rows come in the dtype that the module was made for or cast to.
    """

    _tables: tuple[dict[str, Tensor], Tensor, Tensor] | None = None

    def __init__(self, *args: Any, multiplier: float | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.multiplier = multiplier

    def forward(self, ids: Tensor) -> Tensor:
        """Rows [..., D] of ids [...], on the device of the ids."""
        flat = ids.reshape(-1)
        planes, scales, zeros = self._lookup_tables(ids.device)
        rows = {key: plane.index_select(plane.dim() - 2, flat) for key, plane in planes.items()}
        codes = unpack_codes(rows, self.widths, len(flat), self.in_features)
        grid = scales.index_select(1, flat), zeros.index_select(1, flat)
        values = dequantize(codes, *grid, self.widths).to(self._dtype)
        if self.multiplier is not None:
            values = values * torch.tensor(self.multiplier).to(values)
        return values.view(*ids.shape, self.in_features)

    def project(self, x: Tensor) -> Tensor:
        """y [..., V] of x [..., D]: what a tied head computes."""
        return super().forward(x)

    def _lookup_tables(self, device: torch.device) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Code planes by name, scales f16 [G, V] and zeros u8 [G, V] on a device."""
        if self._tables is None or self._tables[1].device != device:
            packed = self.packed()
            zeros = unpack_zeros(packed.planes, self.widths, self.out_features)
            codes = {k: v.to(device) for k, v in packed.planes.items() if k[:5] != "zeros"}
            self._tables = codes, packed.scales.to(device), zeros.to(device)
        return self._tables

    def _reset(self) -> None:
        super()._reset()
        self._tables = None

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Move as a packed linear does, and follow a cast."""
        super()._apply(fn, recurse)
        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
        return self

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_tables": None}


class TiedHead(nn.Module):
    """The head of a model whose embedding is packed and tied; `bias` [V] is its own, if any."""

    def __init__(self, embedding: QuantizedEmbedding, bias: nn.Parameter | None) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple: not a submodule, so not stored twice
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """The embedding's dequantized weight [V, D], anew at each access."""
        return self._embedding[0].weight

    def forward(self, x: Tensor) -> Tensor:
        """Logits [..., V] of x [..., D]."""
        y = self._embedding[0].project(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class ScaledEmbedding(nn.Embedding):
    """A plain embedding whose rows are multiplied by `multiplier`; what dequantizing leaves."""

    multiplier: float | None = None

    def forward(self, ids: Tensor) -> Tensor:
        """Rows [..., D] of ids [...]."""
        rows = super().forward(ids)
        return rows if self.multiplier is None else rows * torch.tensor(self.multiplier).to(rows)
