"""Small packed models in trellis codes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file

from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.quantization import Allocation, Budget, QuantizationConfig
from bitmill.formats.accounting import checkpoint_tensors
from bitmill.formats.format import order_owners
from bitmill.formats.packed.checkpoint import write_checkpoint
from bitmill.plan.model_plan import make_plan
from bitmill.quant.rotation import packed_rewrites
from bitmill.quant.tensors import Stored
from bitmill.quant.trellis import TrellisTensor, trellis_shapes
from bitmill_kernels.trellis.layout import circle_shapes
from weights import rounded_weight

CYCLE = (3, 4, 2, 6, 8, 5)


def random_linear(
    N: int, K: int, rates: tuple[int, ...], draw: torch.Generator, order: torch.Tensor | None = None
) -> TrellisTensor:
    """Random circles and scales, and an order, random where none is given."""
    circles = {
        key: torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)
        for key, shape in circle_shapes(N, K, rates).items()
    }
    rows, groups = (torch.rand(n, generator=draw).half() for n in (N, len(rates)))
    if order is None:
        order = torch.randperm(K, generator=draw).int()
    return TrellisTensor(N, K, rates, circles, rows, groups, packed_rewrites("trellis", order))


def pack_trellis(
    source: Path, folder: Path, embeddings: Literal["keep", "quantize"] = "keep"
) -> Path:
    """The model with random codes for its linears, of mixed widths and with column orders: weights
    of a standard deviation near 0.05. embeddings: "quantize" rounds embedding and head."""
    allocation = Allocation(embeddings=embeddings)
    plan = make_plan(
        source, QuantizationConfig(budget=Budget(bits=4), code="trellis", allocation=allocation)
    )
    owners = order_owners(plan, "activation")
    generator = torch.Generator().manual_seed(0)
    orders: dict[str, torch.Tensor] = {}
    linears: dict[str, Stored] = {}
    widths = {}
    for place, linear in enumerate(plan.linears):
        N, K, owner = linear.rows, linear.columns, owners.get(linear.name)
        rates = tuple(CYCLE[(place + g) % len(CYCLE)] for g in range(linear.shape.groups))
        shapes = trellis_shapes(N, K, rates)
        circles = {
            key: torch.randint(256, shape, generator=generator, dtype=torch.uint8)
            for key, (dtype, shape) in shapes.items()
            if dtype == torch.uint8
        }
        if owner is not None and owner not in orders:
            orders[owner] = torch.randperm(K, generator=generator).int()
        linears[linear.name] = TrellisTensor(
            N,
            K,
            rates,
            circles,
            torch.full((N,), 0.05).half(),
            torch.ones(len(rates)).half(),
            packed_rewrites("trellis", orders.get(owner or "")),
            linear.name,
        )
        widths[linear.name] = rates
    stored = load_file(source / "model.safetensors")
    for matrix in plan.embeddings:
        widths[matrix.name] = (3, 8, 5, 6)[: matrix.shape.groups]
        rounded = rounded_weight(stored[matrix.source.tensor].float(), widths[matrix.name])
        linears[matrix.name] = rounded.pack()
    folder.mkdir()
    write_checkpoint(
        folder,
        source=source,
        tensors=checkpoint_tensors(plan, widths, "activation"),
        bit_widths=BitWidthMap(order="activation", linears=widths),
        orders={name: f"{owner}.order" for name, owner in owners.items()},
        code="trellis",
        affine={matrix.name for matrix in plan.embeddings},
        linear=linears.__getitem__,
        other=stored.__getitem__,
    )
    return folder
