"""A linear layer whose weight stays in trellis codes: `TrellisLinear`.

    y[..., n] = row_scale[n] * sum_k x'[..., k] group_scale[g] value[n, k] + bias[n]

x' is x in the stored column order, rotated inside its groups (`quant/rotation.py`): once for all
linears that read it, so that these are multiplied together on a CPU too. See `inference/linear.py`
for what all packed linears do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitmill.inference.linear import QuantizedLinear
from bitmill.quant.rotation import Rotation, signs
from bitmill.quant.trellis import TrellisTensor, trellis_shapes
from bitmill_kernels.trellis.product import TrellisProduct
from bitmill_kernels.trellis.product_cuda import CudaTrellisProduct, available


class TrellisLinear(QuantizedLinear):
    """Packed linear of N = `out_features` rows and K = `in_features` columns, a rate per group."""

    code = "trellis"
    shapes = staticmethod(trellis_shapes)
    joins_on_cpu = True

    @staticmethod
    def stacked(modules: Sequence[QuantizedLinear], device: torch.device) -> TrellisRuntime:
        """What multiplies the modules' shared input on a device."""
        weights = []
        for module in modules:
            weight = module.stored()
            assert isinstance(weight, TrellisTensor)
            weights.append(weight)
        return TrellisRuntime(weights, device)


class TrellisRuntime:
    """Linears of one input and one column order on one device; outputs lie side by side."""

    def __init__(self, weights: Sequence[TrellisTensor], device: torch.device) -> None:
        first = weights[0]
        self.device, self.rewrites = device, first.rewrites
        # Kernels rotate by the signs from column 0 on.
        whole = Rotation() in first.rewrites
        on_gpu = whole and device.type == "cuda" and available()
        self.product = (CudaTrellisProduct if on_gpu else TrellisProduct)(
            [weight.kernel_weight() for weight in weights],
            first.K,
            device,
            order=first.order,
            signs=signs(first.K, device) if whole else None,
            inputs=self.rewrites.inputs,
        )
        self.outputs = self.product.outputs

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y [..., N] of x [..., K] in the source's columns, and bias [N] or None."""
        y: Tensor = _Product.apply(x, self)
        return y if bias is None else y + bias

    def multiply(self, x: Tensor) -> Tensor:
        """y [T, N] of x [T, K] in the source's columns, in the dtype of x."""
        if x.shape[-1] != self.product.K:  # kernels check no shape
            raise ValueError(f"x has {x.shape[-1]} columns: the weight has {self.product.K}")
        return self.product.of_source(x)

    def input_gradient(self, dy: Tensor) -> Tensor:
        """dx f32 [T, K] of dy [T, N]."""
        return self.rewrites.undo(self.product.input_gradient(dy.float()))


class _Product(torch.autograd.Function):
    """x W^T and its gradient dy W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, runtime: TrellisRuntime) -> Tensor:
        ctx.runtime, ctx.dtype = runtime, x.dtype
        y = runtime.multiply(x.reshape(-1, x.shape[-1]))
        return y.view(*x.shape[:-1], runtime.product.N)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        dx = ctx.runtime.input_gradient(dy.reshape(-1, dy.shape[-1]))
        return dx.to(ctx.dtype).view(*dy.shape[:-1], ctx.runtime.product.K), None
