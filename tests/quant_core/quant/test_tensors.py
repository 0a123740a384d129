"""Packing is exact, dequantization is the formula, and illegal values are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bitmill.errors import FormatError
from bitmill.quant.rewrites import ColumnOrder, Rewrites
from bitmill.quant.tensors import PackedTensor, QuantizedWeight
from weights import random_weight

SHAPES = [(5, 128, (3,)), (7, 160, (2, 5)), (16, 40, (6,)), (3, 387, (1, 8, 4, 3)), (8, 1, (1,))]
SHAPES += [(5, 387, (0, 3, 0, 2)), (4, 300, (2, 0, 0)), (6, 200, (0, 0))]


def same(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    tensors = zip((a.codes, a.scales, a.zeros), (b.codes, b.scales, b.zeros), strict=True)
    orders = a.order is b.order is None or torch.equal(a.order, b.order)
    return a.widths == b.widths and orders and all(torch.equal(x, y) for x, y in tensors)


@pytest.mark.parametrize(("N", "K", "widths"), SHAPES)
@pytest.mark.parametrize("ordered", [False, True], ids=["natural", "ordered"])
def test_unpack_gives_back_what_was_packed(
    N: int, K: int, widths: tuple[int, ...], ordered: bool
) -> None:
    weight = random_weight(N, K, widths, ordered=ordered, seed=N)
    assert same(weight.pack().unpack(), weight)


@pytest.mark.parametrize(("N", "K", "widths"), SHAPES)
def test_tensors_come_back_from_a_checkpoint(N: int, K: int, widths: tuple[int, ...]) -> None:
    weight = random_weight(N, K, widths, ordered=True, seed=1)
    packed = weight.pack()
    tensors = packed.tensors("a.b")
    assert all(name.startswith("a.b.") for name in tensors)
    again = PackedTensor.from_tensors("a.b", tensors, N, K, widths, packed.rewrites)
    assert same(again.unpack(), weight)


def test_what_rewrites_store_is_listed_apart() -> None:
    packed = random_weight(4, 128, (2,), ordered=True).pack()
    assert packed.rewrites.tensors("x").keys() == {"x.order"}
    assert "x.order" not in packed.tensors("x")


def test_dequantize_is_the_formula_in_source_column_order() -> None:
    weight = random_weight(6, 300, (1, 3, 8), ordered=True, seed=2)
    assert weight.order is not None
    expected = torch.empty(6, 300)
    for k in range(300):
        group = k // 128
        zero = weight.zeros[group].float() / (8 if weight.widths[group] == 1 else 1)
        column = weight.scales[group].float() * (weight.codes[:, k].float() - zero)
        expected[:, int(weight.order[k])] = column
    assert torch.equal(weight.dequantize(), expected)


def test_codes_digest_depends_on_the_bytes_alone() -> None:
    weight = random_weight(3, 130, (4, 2), seed=5)
    strided = weight.codes.t().contiguous().t()
    twin = QuantizedWeight(strided, weight.scales, weight.zeros, weight.widths)
    assert twin.codes_sha256() == weight.codes_sha256()
    changed = weight.codes.clone()
    changed[2, 129] ^= 1
    other = QuantizedWeight(changed, weight.scales, weight.zeros, weight.widths)
    assert other.codes_sha256() != weight.codes_sha256()


def test_dropped_groups_hold_nothing_and_are_zeros() -> None:
    weight = random_weight(6, 300, (0, 3, 0), ordered=True, seed=2)
    packed = weight.pack().tensors("a")
    assert {name: tuple(tensor.shape) for name, tensor in packed.items()} == {
        "a.codes_b3_p2": (1, 6, 32),
        "a.codes_b3_p1": (1, 6, 16),
        "a.zeros_b3": (1, 3),
        "a.scales": (1, 6),
    }
    assert weight.order is not None
    kept = weight.order[128:256].long()
    assert weight.dequantize()[:, kept].any(0).all()
    assert weight.dequantize().count_nonzero() == weight.dequantize()[:, kept].count_nonzero()
    assert random_weight(6, 300, (0, 0, 0)).pack().tensors("a") == {}
    with pytest.raises(FormatError, match="group 2 has width 0, which drops it, and scales that"):
        replace(weight, scales=torch.ones_like(weight.scales).index_fill(0, torch.tensor([0]), 0))


def ordered(order: Tensor) -> Rewrites:
    return Rewrites([ColumnOrder(order)])


def _with(values: Tensor, place: tuple[int, int], value: float) -> Tensor:
    changed = values.clone()
    changed[place] = value
    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {"codes": _with(w.codes, (1, 3), 8)}, "code 8 of group 0 does not fit 3 bits"),
        (lambda w: {"zeros": _with(w.zeros, (1, 2), 4)}, "zero 4 of group 1 does not fit 2 bits"),
        (lambda w: {"zeros": _with(w.zeros, (2, 0), 16)}, "zero 16 of group 2 does not fit 4 bits"),
        (lambda w: {"scales": _with(w.scales, (0, 1), -1.0)}, "holds -1.0 for group 0, row 1"),
        (lambda w: {"scales": _with(w.scales, (0, 1), float("inf"))}, "holds inf"),
        (lambda w: {"scales": _with(w.scales, (0, 1), float("nan"))}, "holds nan"),
        (lambda w: {"scales": w.scales.float()}, "expected torch.float16"),
        (lambda w: {"zeros": w.zeros[:2]}, r"expected torch.uint8 of shape \(3, 4\)"),
        (lambda w: {"codes": w.codes.int()}, "uint8 matrix"),
        (lambda w: {"widths": (3, 2)}, "2 widths for K=280"),
        (lambda w: {"widths": (3, 2, 7)}, "width 7 is not supported"),
        (lambda w: {"rewrites": ordered(torch.zeros(280, dtype=torch.int32))}, "not a permutation"),
        (lambda w: {"rewrites": ordered(torch.arange(280))}, "expected torch.int32"),
        (lambda w: {"rewrites": ordered(torch.arange(8).int())}, r"order is .* of shape \(8,\)"),
    ],
)
def test_illegal_weights_are_refused(
    change: Callable[[QuantizedWeight], dict[str, object]], message: str
) -> None:
    good = random_weight(4, 280, (3, 2, 1), seed=3)
    parts = {key: getattr(good, key) for key in ("codes", "scales", "zeros", "widths")}
    with pytest.raises(FormatError, match=message):
        QuantizedWeight(**(parts | change(good)))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("a.codes_b3_p1", None, "a.codes_b3_p1 is missing"),
        ("a.scales", lambda t: -t, "a.scales holds -"),
        ("a.scales", lambda t: t.float(), "a.scales is torch.float32"),
        ("a.tail_p4", lambda t: t[:, :1], "a.tail_p4 is torch.uint8 of shape"),
        ("a.tail_p4", lambda t: t | 0xF0, "a.tail_p4 has padding bits"),
        ("a.zeros_b3", lambda t: t | 0x80, "a.zeros_b3 has padding bits"),
    ],
)
def test_damaged_tensors_are_refused_by_name(
    name: str, change: Callable[[Tensor], Tensor] | None, message: str
) -> None:
    # 5 rows of 3-bit zeros leave one bit over, 9 columns of the tail leave 7 fields over
    tensors = random_weight(5, 137, (3, 4), seed=4).pack().tensors("a")
    tensors = {key: value for key, value in tensors.items() if change or key != name}
    if change:
        tensors[name] = change(tensors[name])
    with pytest.raises(FormatError, match=message) as refusal:
        PackedTensor.from_tensors("a", tensors, 5, 137, (3, 4))
    assert refusal.value.param == name


@pytest.mark.parametrize("K", [384, 400, 90])
def test_rows_move_in_packed_form(K: int) -> None:
    widths = (1, 3, 8, 6)[: -(-K // 128)]
    weight = random_weight(37, K, widths, ordered=True)
    rows = torch.randperm(37, generator=torch.Generator().manual_seed(1))
    moved = weight.pack().with_rows(rows).unpack()
    assert torch.equal(moved.codes, weight.codes[rows])
    assert torch.equal(moved.scales, weight.scales[:, rows])
    assert torch.equal(moved.zeros, weight.zeros[:, rows])
    assert moved.order is not None
    assert weight.order is not None
    assert torch.equal(moved.order, weight.order)
