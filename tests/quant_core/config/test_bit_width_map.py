"""Byte accounting equals what packing really stores, on ragged shapes too."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitmill.config.bit_width_map import (
    WIDTHS,
    BitWidthMap,
    LinearShape,
    code_bits,
    group_bytes,
)
from bitmill.errors import FormatError
from bitmill.formats.packed.format import Packed
from bitmill_kernels.pack import pack_codes, pack_zeros


@st.composite
def mixed_linear(draw):
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 400))
    shape = LinearShape("x", rows, columns)
    widths = draw(
        st.lists(st.sampled_from([0, *WIDTHS]), min_size=shape.groups, max_size=shape.groups)
    )
    return shape, tuple(widths)


@settings(max_examples=60, deadline=None)
@given(mixed_linear())
def test_linear_bytes_equal_the_packed_tensors(case):
    shape, widths = case
    codes = torch.zeros(shape.rows, shape.columns, dtype=torch.uint8)
    zeros = torch.zeros(shape.groups, shape.rows, dtype=torch.uint8)
    tensors = [*pack_codes(codes, widths).values(), *pack_zeros(zeros, widths).values()]
    scales = 2 * shape.rows * (shape.groups - widths.count(0))
    assert Packed().linear_bytes(shape, widths) == sum(t.nbytes for t in tensors) + scales


def test_group_bytes_of_one_group_by_hand():
    assert group_bytes(3, 10, 128) == 10 * 48 + 20 + 4
    assert group_bytes(1, 10, 128) == 10 * 16 + 20 + 5
    assert group_bytes(3, 10, 64) == 10 * 24 + 20 + 4
    assert group_bytes(5, 1, 1) == 5 + 2 + 1
    assert group_bytes(0, 10, 128) == 0


def test_code_bits_weigh_groups_by_their_columns():
    shapes = [LinearShape("a", 2, 192), LinearShape("b", 4, 128), LinearShape("kept", 9, 9)]
    linears = {"a": (2, 8), "b": (3,)}
    assert code_bits(shapes, linears) == (2 * (2 * 128 + 8 * 64) + 4 * 3 * 128) / (2 * 192 + 512)


def test_map_round_trips_through_its_json(tmp_path):
    first = BitWidthMap(order="activation", linears={"a.b": (0, 3, 4), "c": (8,)})
    assert '"a.b": "034"' in first.to_json()
    (tmp_path / "map.json").write_text(first.to_json())
    assert BitWidthMap.load(tmp_path / "map.json") == first


@pytest.mark.parametrize(
    "text",
    [
        '{"linears": {"a": "39"}}',
        '{"linears": {"a": ""}}',
        '{"linears": {"a": "3"}, "x": 1}',
        "[",
    ],
)
def test_damaged_maps_are_refused(tmp_path, text):
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(FormatError, match=r"map\.json"):
        BitWidthMap.load(tmp_path / "map.json")


def test_map_must_fit_the_model_group_for_group():
    shapes = [LinearShape("a", 4, 256), LinearShape("b", 4, 100)]
    BitWidthMap(linears={"a": (2, 3), "b": (4,)}).check_shapes(shapes)
    with pytest.raises(FormatError, match=r"1 linears missing .*'b'.*1 unknown .*'c'"):
        BitWidthMap(linears={"a": (2, 3), "c": (4,)}).check_shapes(shapes)
    with pytest.raises(FormatError, match="gives 1 groups to a, which has 2"):
        BitWidthMap(linears={"a": (2,), "b": (4,)}).check_shapes(shapes)


def test_a_uniform_map_has_one_width_for_every_group():
    shapes = [LinearShape("a", 4, 256), LinearShape("b", 4, 100)]
    found = BitWidthMap.uniform(shapes, 3, "activation")
    assert found == BitWidthMap(order="activation", linears={"a": (3, 3), "b": (3,)})
    found.check_shapes(shapes)
