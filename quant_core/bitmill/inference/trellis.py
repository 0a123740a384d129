"""A linear layer whose weight stays in trellis codes: `TrellisLinear`.

    y[..., n] = row_scale[n] * sum_k x'[..., k] group_scale[g] value[n, k] + bias[n]

x' is x in the stored column order, rotated inside its groups (`quant/rotation.py`). See
`inference/linear.py` for what all packed linears do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitmill.inference.linear import QuantizedLinear
from bitmill.quant.rewrites import Rewrites
from bitmill.quant.trellis import TrellisTensor, trellis_shapes
from bitmill_kernels.trellis.product import TrellisProduct


class TrellisLinear(QuantizedLinear):
    """Packed linear of N = `out_features` rows and K = `in_features` columns, a rate per group."""

    code = "trellis"
    shapes = staticmethod(trellis_shapes)

    def forward(self, x: Tensor) -> Tensor:
        """y [..., N] of x [..., K], computed on the device and in the dtype of x."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self._runtime is None or self._runtime.device != x.device:
            self._runtime = self._build(x.device)
            self.release()
        product: Tensor = self._runtime(x, bias)
        return product

    def _build(self, device: torch.device) -> _Runtime:
        found = self.stored()
        assert isinstance(found, TrellisTensor)
        return _Runtime(found, device)


class _Runtime:
    """One linear on one device."""

    def __init__(self, weight: TrellisTensor, device: torch.device) -> None:
        self.device, self.rewrites = device, weight.rewrites
        self.product = TrellisProduct(
            weight.circles, weight.row_scales, weight.group_scales, weight.K, weight.widths, device
        )

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = _Product.apply(x, self.product, self.rewrites)
        return y if bias is None else y + bias


class _Product(torch.autograd.Function):
    """x W^T and its gradient dy W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, product: TrellisProduct, rewrites: Rewrites) -> Tensor:
        ctx.product, ctx.rewrites, ctx.dtype = product, rewrites, x.dtype
        inner = x.reshape(-1, x.shape[-1]).float()
        for one in rewrites:
            inner = one.inputs(inner)
        return product(inner).to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        inner = ctx.product.input_gradient(dy.reshape(-1, dy.shape[-1]).float())
        dx = ctx.rewrites.undo(inner)
        return dx.to(ctx.dtype).view(*dy.shape[:-1], -1), None, None
