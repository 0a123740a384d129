"""The shares of one layer of a serving engine: parameters that the engine fills, and what computes.

vLLM and SGLang, which began as one code, make layers alike: q, k and v, or gate and up, are one
layer of several linears, and tensors come one by one, each to its parameter's `weight_loader` with
the linear's place in the layer. A parameter is one flat tensor per name of the format, in which the
shares of the layer lie one behind the other: they have their own widths, so their own shapes. This
module knows no engine; their adapters are in `integrations/`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.errors import FormatError
from bitmill.formats.packed.config import PackedLinear
from bitmill.formats.packed.share import Range, Share, aligned_groups, even_groups
from bitmill.inference.trellis import TrellisRuntime
from bitmill.quant.tensors import PackedTensor, Stored
from bitmill.quant.trellis import TrellisTensor
from bitmill_kernels.matmul.linear import MixedLinear
from bitmill_kernels.matmul.runtime import PackedWeight
from bitmill_kernels.pack import unpack_codes, unpack_zeros
from bitmill_kernels.reference import dequantize

SHARDS = {"q": 0, "k": 1, "v": 2, None: 0}


def joined_parts(
    linears: Mapping[str, PackedLinear],
    prefix: str,
    joined: Mapping[str, Sequence[str]],
    engine: str,
) -> list[PackedLinear]:
    """The linears that a layer is made of, in the order of its outputs; none where it is kept.

    joined: last parts of the names of a joined layer's linears, by that of the layer. Raises
    FormatError where some of them are packed and others are not.
    """
    parent, _, last = prefix.rpartition(".")
    names = [f"{parent}.{name}" for name in joined.get(last, [last])]
    found = [linears[name] for name in names if name in linears]
    if found and len(found) != len(names):
        kept = [name for name in names if name not in linears]
        raise FormatError(
            f"{prefix} joins {', '.join(names)}, of which {', '.join(kept)} are not packed: "
            f"{engine} needs all of them packed, or none",
            param=kept[0],
        )
    return found


def linear_shares(
    parts: Sequence[PackedLinear],
    place: tuple[int, int],
    inputs: tuple[int, int],
    sizes: Sequence[int],
    outputs: int,
    copies: int,
) -> tuple[list[Share], bool]:
    """What one rank holds of the linears of a layer, and whether it needs the inputs of all ranks.

    place: rank and number of ranks. inputs: columns of this rank and of all. sizes: rows of each
    output on this rank. outputs: rows of all ranks together. copies: as for `output_rows`.
    """
    rank, ranks = place
    own_columns, columns = inputs
    groups, gathers = None, False
    if own_columns != columns:
        own = aligned_groups(rank, ranks, columns) if parts[0].order is None else None
        groups = own or even_groups(rank, ranks, len(parts[0].widths))
        gathers = own is None
    rows = output_rows(sizes, rank, ranks if sum(sizes) != outputs else 1, copies)
    if len(parts) == 1:  # the checkpoint itself may join q, k and v
        rows = joined_rows(rows)
    shares = [
        Share(part, N, columns, ranges, groups)
        for part, (ranges, N) in zip(parts, rows, strict=True)
    ]
    return shares, gathers


def register_shares(layer: Any, shares: list[Share], orders: dict[str, Tensor]) -> None:
    """Give the layer its parameters; column orders go to `orders` as they come."""
    layer.bitmill_shares = shares
    for name in sorted({name for share in shares for name in share.stored}):
        sizes = [prod(share.local[name][1]) if name in share.local else 0 for share in shares]
        kind = next(share.stored[name][0] for share in shares if name in share.stored)
        parameter: Any = nn.Parameter(torch.empty(sum(sizes), dtype=kind), requires_grad=False)
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
                f"{first.name} and {share.linear.name} read one input in this engine and have the "
                f"orders {first.order} and {share.linear.order}: they must be the same",
                param=share.linear.name,
            )
    if first.order is None:
        return None
    if first.order not in orders:
        raise FormatError(f"the checkpoint lacks {first.order}", param=first.order)
    return orders[first.order]


def drop_parameters(layer: Any) -> None:
    """The kernels hold what they need; what the engine counts and walks is empty from now on."""
    for share in layer.bitmill_shares:
        for name, (kind, _) in share.stored.items():
            getattr(layer, name).data = torch.empty(0, dtype=kind)
    del layer.bitmill_shares


def linear_loaded(layer: Any, orders: Mapping[str, Tensor]) -> None:
    """All parameters of a linear layer are there: build its product, `layer.bitmill`."""
    shares: list[Share] = layer.bitmill_shares
    order = common_order(shares, orders)
    device = next(layer.parameters()).device
    if layer.bitmill_gathers:
        layer.bitmill_columns = shares[0].reads(order).to(device)
    layer.bitmill = Product([share.weight(order) for share in shares], device)
    drop_parameters(layer)


def embedding_loaded(layer: Any, orders: Mapping[str, Tensor]) -> None:
    """The same of an embedding or head, whose rows `layer.bitmill_rows` looks up."""
    device = next(layer.parameters()).device
    share: Share = layer.bitmill_shares[0]
    weight = share.weight(common_order([share], orders))
    assert isinstance(weight, PackedTensor)
    layer.bitmill_rows = Rows(weight, layer.bitmill_dtype)
    layer.bitmill = Product([weight], device)
    drop_parameters(layer)


class Product:
    """y [..., N] of x [..., K]: the shares' outputs side by side."""

    def __init__(self, weights: list[Stored], device: torch.device) -> None:
        self._run: Callable[[Tensor, Tensor | None], Tensor]
        trellis = [weight for weight in weights if isinstance(weight, TrellisTensor)]
        if trellis:
            assert len(trellis) == len(weights)
            self._run = TrellisRuntime(trellis, device)
        else:
            self._run = MixedLinear([kernel_weight(weight) for weight in weights], device).run

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self._run(x, bias)


def kernel_weight(weight: Any) -> PackedWeight:
    """A `PackedTensor` as the kernels take it."""
    tensors = weight.planes | {"scales": weight.scales}
    return PackedWeight(tensors, weight.widths, weight.N, weight.K, weight.order)


class Rows:
    """Looks rows of a packed embedding up; they come in `dtype`."""

    def __init__(self, weight: PackedTensor, dtype: torch.dtype) -> None:
        self.weight, self.dtype = weight, dtype
        self.zeros = unpack_zeros(weight.planes, weight.widths, weight.N)

    def __call__(self, ids: Tensor) -> Tensor:
        flat, weight = ids.reshape(-1), self.weight
        planes = {
            name: plane.index_select(plane.dim() - 2, flat)
            for name, plane in weight.planes.items()
            if not name.startswith("zeros")
        }
        codes = unpack_codes(planes, weight.widths, len(flat), weight.K)
        grid = weight.scales.index_select(1, flat), self.zeros.index_select(1, flat)
        return dequantize(codes, *grid, weight.widths).to(self.dtype).view(*ids.shape, weight.K)


def output_rows(
    sizes: Sequence[int], rank: int, ranks: int, copies: int
) -> list[tuple[list[Range], int]]:
    """This rank's rows of each output of a layer, and how many all ranks have together.

    sizes: rows on one rank. Of all outputs but the first, keys and values, `copies` ranks hold the
    same rows.
    """
    found = []
    for place, size in enumerate(sizes):
        same = copies if place and ranks > 1 else 1
        first = rank // same * size if ranks > 1 else 0
        found.append(([(first, first + size)], size * ranks // same))
    return found


def joined_rows(outputs: list[tuple[list[Range], int]]) -> list[tuple[list[Range], int]]:
    """The same rows of outputs that lie in one linear, one behind the other."""
    ranges: list[Range] = []
    N = 0
    for (rows,), count in outputs:
        ranges.append((N + rows[0], N + rows[1]))
        N += count
    whole = sum(end - begin for begin, end in ranges) == N
    return [([(0, N)] if whole else ranges, N)]
