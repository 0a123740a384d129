"""The shares of all ranks together are the linear, whatever its code."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from bitmill.errors import FormatError
from bitmill.formats.packed.config import PackedLinear
from bitmill.formats.packed.share import Share, aligned_groups, even_groups
from bitmill.inference.trellis import TrellisLinear, TrellisRuntime
from bitmill.quant.rewrites import Rewrites
from bitmill.quant.rotation import packed_rewrites
from bitmill.quant.tensors import Stored
from bitmill.quant.trellis import TrellisTensor, trellis_shapes
from weights import random_weight

N, K, WIDTHS = 96, 448, (3, 1, 6, 3)  # three full groups and a tail of 64
CODES = ("affine", "trellis")
DROPPING = (0, 3, 0, 2)


def whole(code: str, *, ordered: bool, rows: int = N, widths: tuple[int, ...] = WIDTHS) -> Stored:
    """A linear "m.up" with every value random."""
    packed: Stored = random_weight(rows, K, widths, ordered=ordered).pack()
    if code == "affine":
        return packed
    generator = torch.Generator().manual_seed(1)
    made = {
        key: torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        if dtype == torch.uint8
        else torch.rand(shape, generator=generator).half()
        for key, (dtype, shape) in trellis_shapes(rows, K, WIDTHS).items()
    }
    scales = made.pop("row_scales"), made.pop("group_scales")
    rewrites = packed_rewrites(code, packed.rewrites.order)
    return TrellisTensor(rows, K, WIDTHS, made, *scales, rewrites)


def files(linear: Stored) -> dict[str, Tensor]:
    """The checkpoint's tensors behind the linear's name."""
    ordered = Rewrites.of_order(linear.rewrites.order)
    named = linear.tensors("") | ordered.tensors("")
    return {name.removeprefix("."): tensor for name, tensor in named.items()}


def share_of(
    linear: Stored,
    rows: list[tuple[int, int]] | None = None,
    groups: tuple[int, int] | None = None,
    *,
    loaded: bool = True,
) -> Share:
    order = None if linear.rewrites.order is None else "m.up.order"
    described = PackedLinear("m.up", linear.widths, order, code=linear.kind)
    share = Share(described, linear.N, K, rows or (), groups)
    if loaded:
        for name, tensor in files(linear).items():
            share.load(name, tensor)
    return share


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("code", CODES)
def test_rows_of_all_ranks_are_the_linear(code: str, ranks: int, ordered: bool) -> None:
    linear = whole(code, ordered=ordered)
    size = N // ranks
    for rank in range(ranks):
        rows = (size * rank, size * (rank + 1))
        share = share_of(linear, [rows])
        held = share.weight(share.tensors.get("order"))
        assert size == held.N
        assert torch.equal(held.unpack().dequantize(), linear.unpack().dequantize()[slice(*rows)])


@pytest.mark.parametrize("code", CODES)
def test_several_ranges_of_rows_are_held_one_behind_the_other(code: str) -> None:
    linear = whole(code, ordered=True, rows=72)  # the last tile of 16 rows is half full
    share = share_of(linear, [(16, 32), (48, 72)])
    held = share.weight(share.tensors["order"]).unpack().dequantize()
    weight = linear.unpack().dequantize()
    assert torch.equal(held, torch.cat([weight[16:32], weight[48:72]]))


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("cuts", [(0, 4), (0, 2, 4), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize(("code", "widths"), [*((c, WIDTHS) for c in CODES), ("affine", DROPPING)])
def test_groups_of_all_ranks_are_the_linear(
    code: str, widths: tuple[int, ...], cuts: tuple[int, ...], ordered: bool
) -> None:
    linear = whole(code, ordered=ordered, widths=widths)
    weight, read = linear.unpack().dequantize(), []
    for groups in pairwise(cuts):
        share = share_of(linear, groups=groups)
        order = share.tensors.get("order")
        held = share.weight(order).unpack().dequantize()
        reads = torch.arange(K) if share.all_groups else share.reads(order)
        tolerance = (
            1e-5 if code == "trellis" else 0
        )  # which part is rotated back rounds differently
        torch.testing.assert_close(held, weight[:, reads], rtol=tolerance, atol=tolerance)
        read.append(reads)
    assert torch.equal(torch.cat(read).sort().values, torch.arange(K))


def test_ranks_of_a_trellis_linear_add_up_to_its_product() -> None:
    linear = whole("trellis", ordered=True)
    assert isinstance(linear, TrellisTensor)
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(2))
    y = torch.zeros(5, N)
    for groups in ((0, 1), (1, 4)):
        share = share_of(linear, groups=groups)
        order = share.tensors["order"]
        held = share.weight(order)
        assert isinstance(held, TrellisTensor)
        y += TrellisRuntime([held], x.device)(x[:, share.reads(order)], None)
    expected = TrellisLinear.from_packed(linear)(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_an_engines_own_memory_is_filled() -> None:
    linear = whole("affine", ordered=False)
    share = share_of(linear, [(8, 16)], loaded=False)
    own = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in share.local.items()}
    share.tensors.update(own)
    for name, tensor in files(linear).items():
        share.load(name, tensor)
    assert share.tensors["scales"] is own["scales"]
    assert torch.equal(own["scales"], files(linear)["scales"][:, 8:16])


def test_what_does_not_belong_or_is_missing_is_refused_by_name() -> None:
    linear = whole("affine", ordered=True)
    tensors, share = files(linear), share_of(linear, loaded=False)
    with pytest.raises(FormatError, match=r"m\.up\.codes_b8_p8 is superfluous"):
        share.load("codes_b8_p8", tensors["scales"])
    with pytest.raises(
        FormatError, match=r"m\.up\.scales is torch\.float32.*expected torch\.float16"
    ):
        share.load("scales", tensors["scales"].float())
    with pytest.raises(FormatError, match=r"m\.up\.order is not a permutation"):
        share.load("order", torch.zeros(K, dtype=torch.int32))
    share.load("scales", tensors["scales"])
    with pytest.raises(FormatError, match=r"m\.up\.scales came twice"):
        share.load("scales", tensors["scales"])
    with pytest.raises(FormatError, match=r"lacks m\.up\.codes_b1_p1"):
        share.weight(None)


@pytest.mark.parametrize(
    ("name", "value"), [("scales", -1.0), ("scales", float("nan")), ("zeros_b3", 255)]
)
def test_illegal_values_are_refused_by_name(name: str, value: float) -> None:
    linear = whole("affine", ordered=False, rows=26)  # 78 bits of zero points: two bits of padding
    stored = files(linear)
    stored[name] = stored[name].clone()
    stored[name][0, -1] = value
    with pytest.raises(FormatError, match=rf"m\.up\.{name}"):
        _load_all(share_of(linear, [(13, 26)], loaded=False), stored)


def _load_all(share: Share, stored: dict[str, Tensor]) -> None:
    for key, tensor in stored.items():
        share.load(key, tensor)
    share.weight(None)


def test_cuts_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(FormatError, match="cut at row 24, and trellis codes only at multiples"):
        share_of(whole("trellis", ordered=False), [(0, 24)])
    with pytest.raises(FormatError, match="has 4 groups, too few to give every rank one"):
        share_of(whole("affine", ordered=False), groups=even_groups(0, 8, 4))
    with pytest.raises(FormatError, match="has 4 widths for 640 columns"):
        Share(PackedLinear("m.up", WIDTHS), N, 640)


def test_groups_align_with_the_columns_of_ranks_or_are_split_evenly() -> None:
    assert [aligned_groups(rank, 2, 1024) for rank in range(2)] == [(0, 4), (4, 8)]
    assert aligned_groups(0, 2, 448) is None
    assert aligned_groups(0, 4, 1280) is None
    assert [even_groups(rank, 3, 4) for rank in range(3)] == [(0, 1), (1, 2), (2, 4)]
