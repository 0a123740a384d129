"""A linear layer whose weight stays packed: `QuantizedLinear`, a plain module.

    y[..., n] = sum_k x[..., order[k]] * w[n, k] + bias[n],   w[n, k] = scale * (code - zero)

Its buffers bear the tensor names of the format (docs/format.md), so a state dict of the model is
a packed checkpoint. What a backend computes with is a runtime, built from the buffers at the
first use on a device and dropped when the module moves; it is never stored.

The reference backend's runtime is a dequantized copy of the weight in the compute dtype and the
source's column order: as fast as the original linear, and as large. The log says so once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn

from bitmill.packed import PackedTensor, packed_shapes

_LOG = logging.getLogger(__name__)

Runtime = Callable[[Tensor, Tensor | None], Tensor]
"""(x [..., K] in source column order, bias [N] or None) -> y [..., N], all of one dtype."""


class QuantizedLinear(nn.Module):
    """Packed linear of N = `out_features` rows and K = `in_features` columns.

    widths: one bit width per group of 128 columns
    order:  None where columns keep their order, "own" where the column order is stored under
            this linear's name, "shared" where another linear stores it and `share_order` gives it
    Buffers are empty until a checkpoint is loaded or `fill` is called.
    """

    scales: Tensor
    order: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        widths: tuple[int, ...],
        *,
        bias: bool = False,
        order: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.widths = widths
        for key, (kind, shape) in packed_shapes(out_features, in_features, widths).items():
            self.register_buffer(key, torch.empty(shape, dtype=kind, device=device))
        columns = torch.empty(in_features, dtype=torch.int32, device=device) if order else None
        self.register_buffer("order", columns, persistent=order == "own")
        self.bias: nn.Parameter | None = None
        if bias:
            empty = torch.empty(out_features, dtype=dtype, device=device)
            self.bias = nn.Parameter(empty, requires_grad=False)
        self._dtype = dtype or torch.get_default_dtype()
        self._runtimes: dict[torch.dtype, Runtime] = {}

    @classmethod
    def from_packed(cls, packed: PackedTensor, *, bias: Tensor | None = None) -> Self:
        """A module that holds these tensors, on their device."""
        module = cls(
            packed.K,
            packed.N,
            packed.widths,
            bias=bias is not None,
            order="own" if packed.order is not None else None,
            device="meta",
        )
        module.fill(packed.tensors(""), bias)
        return module

    def fill(self, tensors: Mapping[str, Tensor], bias: Tensor | None = None) -> None:
        """Take over the buffers' tensors, named as in the format behind a leading dot."""
        for key, tensor in tensors.items():
            setattr(self, key.removeprefix("."), tensor)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)
        self._runtimes.clear()

    def share_order(self, order: Tensor) -> None:
        """Use the column order i32 [K] that another linear stores."""
        self.order = order
        self._runtimes.clear()

    def packed(self, name: str = "weight") -> PackedTensor:
        """The buffers as a `PackedTensor`, checked in full; `name` appears in the errors.

        Raises FormatError as `PackedTensor.from_tensors` does.
        """
        keys = packed_shapes(self.out_features, self.in_features, self.widths)
        tensors = {f"{name}.{key}": getattr(self, key) for key in keys}
        return PackedTensor.from_tensors(
            name, tensors, self.out_features, self.in_features, self.widths, self.order
        )

    def dequantize(self) -> Tensor:
        """Weight f32 [N, K] in the source's column order."""
        return self.packed().unpack().dequantize()

    @property
    def weight(self) -> Tensor:
        """Dequantized weight [N, K] in the dtype the module was made for, anew at each access.

        For code that asks a linear for its weight's values or dtype; writing to it has no effect.
        """
        return self.dequantize().to(self._dtype)

    def forward(self, x: Tensor) -> Tensor:
        """y [..., N] of x [..., K], computed in the dtype of x."""
        runtime = self._runtimes.get(x.dtype)
        if runtime is None:
            runtime = self._runtimes[x.dtype] = self._build_runtime(x.dtype)
        return runtime(x, None if self.bias is None else self.bias.to(x.dtype))

    def extra_repr(self) -> str:
        """Shape and widths, for printing a model."""
        widths = "".join(map(str, self.widths))
        return f"in_features={self.in_features}, out_features={self.out_features}, widths={widths}"

    def _build_runtime(self, dtype: torch.dtype) -> Runtime:
        return DenseRuntime(self.dequantize().to(dtype))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Move buffers; scales stay fp16 whatever dtype the model is cast to."""
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != torch.float16:
            self.scales = scales.to(self.scales.device)
        self._runtimes.clear()
        return self


class DenseRuntime:
    """The reference backend: multiply with the dequantized weight [N, K] in the compute dtype."""

    def __init__(self, weight: Tensor) -> None:
        _say_dense()
        self._weight = weight

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(x, self._weight, bias)


@cache
def _say_dense() -> None:
    _LOG.warning(
        "packed linears run on the reference backend, which keeps a dequantized copy of each: "
        "the model takes as much memory as the original in the compute dtype"
    )
