"""What a bit-width map takes of each kind of budget, in exact integers. Torch-free.

    code_bits   sum(b * N * c) code bits          per sum(N * K)
    bits        bytes of codes, scales, zeros and orders, times 8, per sum(N * K)
    size        bytes of all safetensors files, headers included

`code_bits` and `bits` are sums over groups. `size` is not: the header's length depends on which
tensors exist and how many digits their shapes and offsets have, so it is measured, not summed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from bitmill.config.bit_width_map import BitWidthMap, group_bytes, group_columns, linear_bytes
from bitmill.config.quantization import Budget
from bitmill.formats.packed.layout import stored_tensors
from bitmill.io.safetensors import TensorInfo, checkpoint_bytes
from bitmill.plan.model_plan import Plan

Order = Literal["natural", "activation"]
Kind = Literal["code_bits", "bits", "size"]
Widths = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Footprint:
    """A map in the units of all three budgets."""

    code_bits: float
    bits: float
    size: int


def order_owners(plan: Plan, order: Order) -> dict[str, str]:
    """Linear -> the linear whose `.order` tensor holds its column order; empty for `natural`.

    The first linear that reads an input owns the order of that input's columns. An order that is
    folded into the rows of the linears before it is stored nowhere.
    """
    if order == "natural":
        return {}
    return {
        name: first
        for block in range(plan.block_count)
        for first, *others in plan.siblings(block)
        if first not in plan.feeders
        for name in (first, *others)
    }


def checkpoint_tensors(plan: Plan, widths: Widths, order: Order) -> list[TensorInfo]:
    """Every tensor of the packed checkpoint, in the order in which shards are filled."""
    owners = order_owners(plan, order)
    return stored_tensors(
        [tensor.spec for tensor in plan.tensors],
        plan.shapes,
        widths,
        {name: f"{owner}.order" for name, owner in owners.items()},
    )


def order_bytes(plan: Plan, order: Order) -> int:
    """Bytes of all stored column orders: 4 per column of every distinct input."""
    owners = set(order_owners(plan, order).values())
    return sum(4 * linear.columns for linear in plan.linears if linear.name in owners)


def measure(plan: Plan, widths: Widths, order: Order, kind: Kind) -> int:
    """What the map takes: code bits, stored bytes or file bytes, after `kind`."""
    if kind == "code_bits":
        return sum(
            linear.rows * sum(b * c for b, c in zip(widths[linear.name], columns, strict=True))
            for linear in plan.shapes
            for columns in [group_columns(linear.columns)]
        )
    if kind == "bits":
        groups = sum(linear_bytes(shape, widths[shape.name]) for shape in plan.shapes)
        return groups + order_bytes(plan, order)
    return checkpoint_bytes(checkpoint_tensors(plan, widths, order))


def limit(plan: Plan, budget: Budget) -> int:
    """The largest `measure` whose `value` is within the budget."""
    if budget.kind == "size":
        return int(budget.value)
    unit = 1 if budget.kind == "code_bits" else 8
    whole = math.floor(Fraction(budget.value) * plan.weights / unit)
    return whole + (value(plan, budget.kind, whole + 1) <= budget.value)


def value(plan: Plan, kind: Kind, measured: int) -> float | int:
    """A measured amount in the budget's unit: bits per weight, or bytes for `size`."""
    if kind == "size":
        return measured
    return measured * (1 if kind == "code_bits" else 8) / plan.weights


def describe(plan: Plan, kind: Kind, measured: int) -> str:
    """A measured amount for messages, bits rounded up so that asking for it works."""
    if kind == "size":
        return f"{measured:,} bytes"
    return f"{math.ceil(value(plan, kind, measured) * 10_000) / 10_000:.4f}"


def group_weight(kind: Kind, rows: int, columns: int, width: int) -> int:
    """What one group adds: code bits for `code_bits`, else stored bytes."""
    if kind == "code_bits":
        return rows * columns * width
    return group_bytes(width, rows, columns)


def footprint(plan: Plan, bit_width_map: BitWidthMap) -> Footprint:
    """Code bits, stored bits and checkpoint bytes of a map."""
    widths, order = bit_width_map.linears, bit_width_map.order
    return Footprint(
        code_bits=float(value(plan, "code_bits", measure(plan, widths, order, "code_bits"))),
        bits=float(value(plan, "bits", measure(plan, widths, order, "bits"))),
        size=measure(plan, widths, order, "size"),
    )
