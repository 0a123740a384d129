import os
import subprocess
import sys

import pytest

from bitmill_kernels.layout import (
    PLANES,
    WIDTHS,
    check_widths,
    code_tensor_shapes,
    group_columns,
    group_count,
    scale_tensor_shapes,
    zero_bits,
    zero_tensor_shapes,
)


def test_the_planes_of_a_width_add_up_to_it():
    assert tuple(PLANES) == (0, *WIDTHS)
    assert all(sum(planes) == width for width, planes in PLANES.items())


@pytest.mark.parametrize(
    ("K", "columns"),
    [(0, []), (1, [1]), (127, [127]), (128, [128]), (129, [128, 1]), (576, [128] * 4 + [64])],
)
def test_groups_are_128_columns_and_a_tail(K, columns):
    assert group_columns(K) == columns
    assert group_count(K) == len(columns)


def test_shapes_of_codes_follow_the_format():
    shapes = code_tensor_shapes(10, 300, (3, 8, 5))
    assert shapes == {
        "codes_b3_p2": (1, 10, 32),
        "codes_b3_p1": (1, 10, 16),
        "codes_b8_p8": (1, 10, 128),
        "tail_p4": (10, 24),
        "tail_p1": (10, 6),
    }


def test_shapes_of_zeros_follow_the_format():
    assert zero_bits(1) == 4
    assert zero_tensor_shapes(10, (1, 3, 3)) == {"zeros_b1": (1, 5), "zeros_b3": (2, 4)}


def test_dropped_groups_have_no_shapes():
    widths = (0, 2, 0)
    assert code_tensor_shapes(10, 300, widths) == {"codes_b2_p2": (1, 10, 32)}
    assert scale_tensor_shapes(10, widths) == {"scales": (1, 10)}
    assert zero_tensor_shapes(10, widths) == {"zeros_b2": (1, 3)}
    for shapes in (code_tensor_shapes(10, 300, (0,) * 3), scale_tensor_shapes(10, (0,) * 3)):
        assert shapes == {}


@pytest.mark.parametrize(("widths", "word"), [((7,), "width 7"), ((3, 3), "2 widths")])
def test_illegal_widths_are_refused_by_value(widths, word):
    with pytest.raises(ValueError, match=word):
        check_widths(widths, 128)


def test_the_package_and_the_layout_load_no_tensor_library():
    code = (
        "import sys, bitmill_kernels, bitmill_kernels.layout; bitmill_kernels.group_count(4);"
        "print(sorted({'torch', 'triton', 'numpy'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "[]"


def test_every_exported_name_exists():
    import bitmill_kernels

    assert [name for name in bitmill_kernels.__all__ if not hasattr(bitmill_kernels, name)] == []
    with pytest.raises(AttributeError, match="nothing"):
        _ = bitmill_kernels.nothing
