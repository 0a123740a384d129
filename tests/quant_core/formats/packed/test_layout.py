"""The list of stored tensors agrees with the byte accounting and with what packing makes."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitmill.config.bit_width_map import LinearShape
from bitmill.config.quantization import Budget, QuantizationConfig
from bitmill.errors import FormatError
from bitmill.formats.format import Contents, format_of
from bitmill.formats.packed.format import Packed
from bitmill.formats.packed.layout import linear_tensors, stored_tensors
from bitmill.io.safetensors import TensorInfo
from bitmill_kernels.layout import PLANES, group_count
from plans import llama_plan
from weights import random_weight

NORM = TensorInfo("norm.weight", "F32", (8,))
KINDS = {"torch.uint8": "U8", "torch.float16": "F16", "torch.int32": "I32"}


@st.composite
def linears(draw: st.DrawFn) -> tuple[LinearShape, tuple[int, ...]]:
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 400))
    groups = group_count(columns)
    widths = draw(st.lists(st.sampled_from(list(PLANES)), min_size=groups, max_size=groups))
    return LinearShape("a.b", rows, columns), tuple(widths)


@settings(max_examples=60, deadline=None)
@given(linears(), st.booleans())
def test_names_shapes_and_bytes_are_those_of_packing(
    linear: tuple[LinearShape, tuple[int, ...]], ordered: bool
) -> None:
    shape, widths = linear
    specs = linear_tensors(shape, widths, owns_order=ordered)
    packed = random_weight(shape.rows, shape.columns, widths, ordered=ordered).pack()
    assert {(s.name, s.dtype, s.shape) for s in specs} == {
        (name, KINDS[str(tensor.dtype)], tuple(tensor.shape))
        for name, tensor in (packed.tensors("a.b") | packed.rewrites.tensors("a.b")).items()
    }
    order_bytes = 4 * shape.columns if ordered else 0
    assert sum(spec.nbytes for spec in specs) == Packed().linear_bytes(shape, widths) + order_bytes


def test_linears_come_first_in_the_model_s_order_and_own_orders_once() -> None:
    shapes = [LinearShape("q", 8, 128), LinearShape("k", 4, 128)]
    orders = {"q": "q.order", "k": "q.order"}
    specs = stored_tensors([NORM], shapes, {"k": (2,), "q": (3,)}, orders)
    assert [spec.name for spec in specs] == [
        *("q.codes_b3_p2", "q.codes_b3_p1", "q.order", "q.scales", "q.zeros_b3"),
        *("k.codes_b2_p2", "k.scales", "k.zeros_b2"),
        "norm.weight",
    ]


def test_dropped_groups_store_nothing() -> None:
    specs = linear_tensors(LinearShape("q", 8, 300), (0, 2, 0), owns_order=True)
    assert [(spec.name, spec.shape) for spec in specs] == [
        ("q.codes_b2_p2", (1, 8, 32)),
        ("q.order", (300,)),
        ("q.scales", (1, 8)),
        ("q.zeros_b2", (1, 2)),
    ]
    assert linear_tensors(LinearShape("q", 8, 300), (0, 0, 0)) == []


def test_trellis_codes_of_a_7b_shape_store_little_beside_their_bits() -> None:
    asked = QuantizationConfig(budget=Budget(bits=3), code="trellis")
    shape = llama_plan(blocks=32, hidden=4096, inner=11008, kv=4096)
    plan = shape.stored_as(asked.format, asked.transforms, folds=asked.method.folds)
    rates = {one.name: tuple(g % 8 + 1 for g in range(one.groups)) for one in plan.shapes}
    bits: Counter[str] = Counter()
    for tensor in format_of(plan).tensors(Contents(plan, rates, asked.allocation.order)):
        linear, _, kind = tensor.name.rpartition(".")
        if linear in rates:
            bits[kind] += 8 * tensor.nbytes
    codes = sum(count for kind, count in bits.items() if kind.startswith("codes_"))
    assert codes == sum(128 * one.rows * sum(rates[one.name]) for one in plan.shapes)
    scales = (bits["row_scales"] + bits["group_scales"]) / plan.weights
    orders = bits["order"] / plan.weights
    assert (round(scales, 4), round(orders, 4)) == (0.0034, 0.0037)
    assert bits.total() - codes == pytest.approx(0.00707 * plan.weights, rel=1e-3)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({}, "linear q is in the model but not in the map"),
        ({"q": (3,), "z": (3,)}, "linear z is in the map but not in the model"),
        ({"q": (3, 3)}, "q: 2 widths for K=128"),
        ({"q": (7,)}, "q: width 7 is not supported"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(
    widths: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        stored_tensors([], [LinearShape("q", 8, 128)], widths)
