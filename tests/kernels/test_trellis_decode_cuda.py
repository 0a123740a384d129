"""What the decode kernel of trellis codes is told, without a GPU."""

import numpy as np
import pytest

from bitmill_kernels.hopper.schedule import MAX_SHARED_BYTES, RESERVED_SHARED_BYTES
from bitmill_kernels.trellis.decode_cuda import (
    LAUNCHES,
    SHAPES,
    group_table,
    input_bytes,
    plan,
    shape_for,
)
from bitmill_kernels.trellis.layout import RATES


def test_groups_of_one_rate_follow_each_other_and_know_how_many_are_left():
    rates = (3, 2, 4, 3, 2, 3)
    addresses = [(g + 1) << 33 for g in range(6)]
    table = group_table(addresses, rates)
    assert table.dtype == np.int32
    assert table[:, 2].tolist() == [2, 2, 3, 3, 3, 4]
    assert table[:, 3].tolist() == [2, 1, 3, 2, 1, 1]
    assert table[:, 4].tolist() == [1, 4, 0, 3, 5, 2]
    found = np.ascontiguousarray(table[:, :2]).view(np.int64)[:, 0]
    assert found.tolist() == [addresses[g] for g in table[:, 4]]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", LAUNCHES)
@pytest.mark.parametrize("rate", RATES)
def test_every_rate_has_a_ring_of_several_stages(rate, tokens, shape):
    stages = plan(rate, shape, tokens, 3)
    assert stages.count >= 3
    assert stages.bytes % 16 == 0
    assert stages.bytes >= shape.rows * 16 * rate + input_bytes(tokens, 3)
    most = MAX_SHARED_BYTES + RESERVED_SHARED_BYTES
    assert shape.blocks * (stages.shared_bytes + RESERVED_SHARED_BYTES) <= most


def test_large_linears_take_more_rows_a_block():
    assert shape_for(28672 * 8192).rows == 256
    assert shape_for(4096 * 11008).rows == 64
