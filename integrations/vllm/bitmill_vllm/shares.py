"""The shares of one vLLM layer: parameters that vLLM fills, and what multiplies with them.

A parameter is one flat tensor per name of the format, in which the shares of a fused layer (q, k
and v, or gate and up) lie one behind the other: they have their own widths, so their own shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.errors import FormatError
from bitmill.formats.packed.share import Share
from bitmill.inference.trellis import TrellisRuntime
from bitmill.quant.tensors import PackedTensor, Stored
from bitmill.quant.trellis import TrellisTensor
from bitmill_kernels.matmul.linear import MixedLinear
from bitmill_kernels.matmul.runtime import PackedWeight

SHARDS = {"q": 0, "k": 1, "v": 2, None: 0}


def register_shares(layer: nn.Module, shares: list[Share], orders: dict[str, Tensor]) -> None:
    """Give the layer its parameters; column orders go to `orders` as they come."""
    layer.bitmill_shares = shares
    for name in sorted({name for share in shares for name in share.stored}):
        sizes = [prod(share.local[name][1]) if name in share.local else 0 for share in shares]
        kind = next(share.stored[name][0] for share in shares if name in share.stored)
        parameter = nn.Parameter(torch.empty(sum(sizes), dtype=kind), requires_grad=False)
        for share, piece in zip(shares, parameter.data.split(sizes), strict=True):
            if name in share.local:
                share.tensors[name] = piece.view(share.local[name][1])
        parameter.weight_loader = _loader(shares, name, orders)
        layer.register_parameter(name, parameter)


def _loader(shares: list[Share], name: str, orders: dict[str, Tensor]) -> Callable[..., None]:
    def load(parameter: nn.Parameter, stored: Tensor, shard: str | int | None = None) -> None:
        share = shares[shard if isinstance(shard, int) else SHARDS[shard]]
        share.load(name, stored)
        if name == "order":
            orders[f"{share.linear.name}.order"] = share.tensors["order"]

    return load


def common_order(shares: list[Share], orders: Mapping[str, Tensor]) -> Tensor | None:
    """The column order i32 [K] that all shares of a layer have."""
    first = shares[0].linear
    for share in shares:
        if share.linear.order != first.order:
            raise FormatError(
                f"{first.name} and {share.linear.name} read one input in vLLM and have the orders "
                f"{first.order} and {share.linear.order}: they must be the same",
                param=share.linear.name,
            )
    if first.order is None:
        return None
    if first.order not in orders:
        raise FormatError(f"the checkpoint lacks {first.order}", param=first.order)
    return orders[first.order]


def drop_parameters(layer: nn.Module) -> None:
    """The kernels hold what they need; what vLLM counts and walks is empty from now on."""
    for share in layer.bitmill_shares:
        for name, (kind, _) in share.stored.items():
            getattr(layer, name).data = torch.empty(0, dtype=kind)
    del layer.bitmill_shares


class Product:
    """y [..., N] of x [..., K]: the shares' outputs side by side."""

    def __init__(self, weights: list[Stored], device: torch.device) -> None:
        self._stack: MixedLinear | None = None
        self._each: list[TrellisRuntime] = []
        if all(isinstance(weight, PackedTensor) for weight in weights):
            self._stack = MixedLinear([kernel_weight(weight) for weight in weights], device)
            return
        for weight in weights:
            assert isinstance(weight, TrellisTensor)
            self._each.append(TrellisRuntime(weight, device))

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self._stack is not None:
            return self._stack.run(x, bias)
        y = torch.cat([one(x, None) for one in self._each], -1)
        return y if bias is None else y + bias


def kernel_weight(weight: Any) -> PackedWeight:
    """A `PackedTensor` as the kernels take it."""
    tensors = weight.planes | {"scales": weight.scales}
    return PackedWeight(tensors, weight.widths, weight.N, weight.K, weight.order)
