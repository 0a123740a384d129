"""What a bit-width map takes of each kind of budget, in exact integers. Torch-free.

    code_bits   sum(b * N * c) code bits, 16 * N of an outlier column    per sum(N * K)
    bits        bytes of codes, scales, zeros, orders and outliers, times 8, per sum(N * K)
    size        bytes of all safetensors files, headers included
    memory      the same; what a budget of memory must hold beside them is taken off its limit
    max_loss_increase   the same, without a limit

`code_bits` and `bits` are sums over groups. `size` is not: the header's length depends on which
tensors exist and how many digits their shapes and offsets have, so it is measured, not summed.
Which tensors there are the plan's format says (`formats/format.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from bitmill.config.bit_width_map import (
    NO_OUTLIERS,
    OUTLIER_BITS,
    BitWidthMap,
    group_columns,
    outlier_bytes,
)
from bitmill.config.codes import embedding_width
from bitmill.config.quantization import FILE_KINDS, Budget, Kind
from bitmill.formats.format import Contents, Order, Outliers, Widths, format_of
from bitmill.io.safetensors import TensorInfo
from bitmill.plan.model_plan import Plan
from bitmill.plan.serving_memory import beside_weights

UNLIMITED = 1 << 62
"""Limit in bytes of a budget that limits none."""


@dataclass(frozen=True)
class Footprint:
    """A map in the units of all three budgets."""

    code_bits: float
    bits: float
    size: int


def checkpoint_tensors(
    plan: Plan, widths: Widths, order: Order, outliers: Outliers = NO_OUTLIERS
) -> list[TensorInfo]:
    """Every tensor of the checkpoint in the plan's format, in the order in which it is filed."""
    return format_of(plan).tensors(Contents(plan, widths, order, outliers=outliers))


def fixed(plan: Plan, order: Order, kind: Kind, outliers: Outliers = NO_OUTLIERS) -> int:
    """What no width changes: code bits of outlier columns, or stored bytes of those, of column
    orders and of other rewrites."""
    rows = {linear.name: linear.rows for linear in plan.linears} if outliers else {}
    if kind == "code_bits":
        return sum(OUTLIER_BITS * rows[name] * count for name, count in outliers.items())
    kept = sum(outlier_bytes(rows[name], count) for name, count in outliers.items())
    return kept + format_of(plan).fixed_bytes(plan, order)


def measure(
    plan: Plan, widths: Widths, order: Order, kind: Kind, outliers: Outliers = NO_OUTLIERS
) -> int:
    """What the map takes: code bits, stored bytes or file bytes, after `kind`."""
    if kind == "code_bits":
        return fixed(plan, order, kind, outliers) + sum(
            linear.rows * sum(b * c for b, c in zip(widths[linear.name], columns, strict=True))
            for linear in plan.shapes
            for columns in [group_columns(linear.columns)]
        )
    chosen = format_of(plan)
    if kind == "bits":
        groups = (
            chosen.linear_bytes(one.shape, widths[one.name], embedding=one.embedding)
            for one in plan.matrices
        )
        return sum(groups) + fixed(plan, order, kind, outliers)
    return chosen.file_bytes(Contents(plan, widths, order, outliers=outliers))


def measure_map(plan: Plan, bit_widths: BitWidthMap, kind: Kind) -> int:
    """`measure` of a map."""
    return measure(plan, bit_widths.linears, bit_widths.order, kind, bit_widths.outliers)


def limit(plan: Plan, budget: Budget) -> int:
    """The largest `measure` whose `value` is within the budget; of memory, what is left of it."""
    if budget.in_bytes:
        return int(budget.value) - beside_weights(plan, budget)
    if budget.kind == "max_loss_increase":
        return UNLIMITED
    unit = 1 if budget.kind == "code_bits" else 8
    whole = math.floor(Fraction(budget.value) * plan.weights / unit)
    return whole + (value(plan, budget.kind, whole + 1) <= budget.value)


def value(plan: Plan, kind: Kind, measured: int) -> float | int:
    """A measured amount in the budget's unit: bits per weight, or bytes of files."""
    if kind in FILE_KINDS:
        return measured
    return measured * (1 if kind == "code_bits" else 8) / plan.weights


def describe(plan: Plan, kind: Kind, measured: int) -> str:
    """A measured amount for messages, bits rounded up so that asking for it works."""
    if kind in FILE_KINDS:
        return f"{measured:,} bytes"
    return f"{math.ceil(value(plan, kind, measured) * 10_000) / 10_000:.4f}"


def group_weight(
    plan: Plan, kind: Kind, rows: int, columns: int, width: int, *, embedding: bool = False
) -> int:
    """What one group of a linear, or of an embedding or head, adds: code bits for `code_bits`, else
    stored bytes."""
    if kind == "code_bits":
        return rows * columns * width
    chosen = format_of(plan)
    of_group = chosen.embedding_group_bytes if embedding else chosen.group_bytes
    return of_group(width, rows, columns)


def uniform_map(plan: Plan, width: int, legal: Iterable[int], order: Order) -> BitWidthMap:
    """One width for all groups; embeddings and heads have the nearest of the legal widths that
    affine codes have (`config.codes.embedding_width`)."""
    other = embedding_width(width, legal) if plan.embeddings else width
    widths = {
        one.name: (other if one.embedding else width,) * one.shape.groups for one in plan.matrices
    }
    return BitWidthMap(order=order, linears=widths)


def footprint(plan: Plan, bit_width_map: BitWidthMap) -> Footprint:
    """Code bits, stored bits and checkpoint bytes of a map."""
    return Footprint(
        code_bits=float(value(plan, "code_bits", measure_map(plan, bit_width_map, "code_bits"))),
        bits=float(value(plan, "bits", measure_map(plan, bit_width_map, "bits"))),
        size=measure_map(plan, bit_width_map, "size"),
    )
