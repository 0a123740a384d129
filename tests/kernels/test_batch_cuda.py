"""What surrounds the kernels for many tokens and needs no GPU: shapes, shared memory, tables."""

import numpy as np
import pytest
import torch

from bitmill_kernels.hopper.launch import Launch, launches_for
from bitmill_kernels.hopper.schedule import (
    MAX_SHARED_BYTES,
    WarpgroupShape,
    batch_tokens,
    decode_tokens,
    group_bytes,
    plan_rings,
    unit_table,
    whole_tiles,
)
from bitmill_kernels.layout import WIDTHS
from bitmill_kernels.matmul import batch_cuda, tiles
from bitmill_kernels.matmul.runtime import build_runtime
from bitmill_kernels.matmul.units import build_schedule
from bitmill_kernels.trellis import batch_cuda as trellis
from bitmill_kernels.trellis.layout import RATES, tile_bytes
from bitmill_kernels.trellis.product import full_circles
from bitmill_kernels.workspace import NOTHING, workspace
from kernel_cases import random_linear

CPU = torch.device("cpu")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("N", [100, 256, 896])
def test_every_weight_gets_a_shape_for_every_number_of_tokens(width, N):
    weight = build_runtime([random_linear(N, 512, (width,) * 4)[0]], CPU)
    shapes = tiles.batch_shapes(weight)
    assert list(shapes) == [32, 64, 128, 256][: 4 if width <= 4 else 3]
    for tokens, shape in shapes.items():
        rings = batch_cuda.plan(weight, shape, tokens)
        assert rings is not None
        assert rings.total_bytes <= MAX_SHARED_BYTES
        assert weight.members[0].rows % shape.rows == 0


@pytest.mark.parametrize(
    ("N", "groups"), [(1024, (2, 2, 2, 2)), (4096, (4, 2, 2, 2)), (8192, (4, 4, 2, 2))]
)
def test_blocks_take_more_rows_where_few_of_them_share_a_tile(N, groups):
    weight = build_runtime([random_linear(N, 256, (3, 2))[0]], CPU)
    assert tuple(shape.groups for shape in tiles.batch_shapes(weight).values()) == groups


@pytest.mark.parametrize("rate", RATES)
def test_every_rate_of_a_trellis_gets_a_shape_for_every_number_of_tokens(rate):
    shapes = trellis.fitting_shapes((rate, 1), 1 << 20)
    assert list(shapes) == list(trellis.SHAPES)
    assert {shape.groups for shape in shapes.values()} == {2}
    wide = [shape.groups for shape in trellis.fitting_shapes((rate, 1), 1 << 25).values()]
    assert wide == [4, 4, 2, 2]
    for tokens, shape in shapes.items():
        rings = trellis.plan((rate, 1), shape, tokens)
        assert rings is not None
        assert rings.stage_bytes == shape.rows * 16 * rate


@pytest.mark.parametrize("groups", [1, 2])
def test_rings_hold_two_units_and_a_slot_more_than_groups_or_there_is_no_plan(groups):
    for stage_bytes in range(1024, 120_000, 1024):
        for tokens in (8, 32, 64, 128, 256):
            rings = plan_rings(stage_bytes, tokens, groups)
            least = 2 * stage_bytes + (groups + 1) * group_bytes(tokens) + 1024
            assert (rings is not None) == (least <= MAX_SHARED_BYTES)
            if rings is not None:
                assert rings.stages >= 2
                assert rings.slots > groups
                used = rings.stages * stage_bytes + rings.slots * group_bytes(tokens)
                assert used < rings.total_bytes <= MAX_SHARED_BYTES


def test_large_matrices_stay_packed_longest():
    large, middle, small = 28672 * 8192, 11008 * 4096, 4096 * 4096
    assert [batch_tokens(size, 128) for size in (large, middle, small, 1)] == [512, 256, 128, 128]
    assert [batch_tokens(size, 256) for size in (large, middle, small, 1)] == [1024, 256, 256, 128]
    assert [decode_tokens(size) for size in (large, middle, small, 1)] == [16, 8, 8, 8]
    assert [trellis.most_tokens(size) for size in (large, small, 1)] == [1024, 256, 128]


def table_of(tiles, blocks, pairs=16):
    """For so many tiles of 128 rows, each of `pairs` pairs."""
    count = pairs * tiles
    nothing = np.zeros(count, dtype=np.int64)
    tile = np.repeat(np.arange(tiles), pairs)
    unit = dict.fromkeys(("low", "high", "grid"), nothing) | {
        "pair": np.tile(np.arange(pairs), tiles),
        "width": nothing + 3,
        "live_rows": nothing + 128,
        "output": tile * 128,
        "tile": tile,
        "first": np.zeros((2, count), dtype=np.int64),
        "live": np.zeros((2, count), dtype=np.int64),
    }
    return unit_table(unit, np.ones(count), blocks)


def runs_of(table):
    """Of each block its units: blocks of the tile, takers where it ends, output, first block."""
    words = table.view(np.uint32)
    return [
        [(r[5] >> 16, r[4] >> 16, r[6], r[7]) for r in block[1 : 1 + block[0, 0]].tolist()]
        for block in words
    ]


def test_tiles_end_with_blocks_where_few_blocks_are_left_idle():
    aligned = table_of(32, whole_tiles(32, 132))
    assert len(aligned) == 128
    assert (aligned[:, 0, 0] == 4).all()
    shared = aligned[:, 1, 5] >> 16
    assert (shared == 4).all()
    assert whole_tiles(43, 132) == 129
    assert whole_tiles(20, 132) == whole_tiles(86, 132) == whole_tiles(300, 132) == 132


def test_blocks_of_the_batch_kernel_take_as_many_units_whatever_their_width():
    weight = build_runtime([random_linear(512, 4096, (1, 8, 2, 4) * 8)[0]], CPU)
    schedule = build_schedule(weight, 128, 16, None)
    assert schedule.units[:, 0, 0].tolist() == [4] * 16
    by_bytes = build_schedule(weight, 128, 16, 1.0).units[:, 0, 0]
    assert len(set(by_bytes.tolist())) > 1


@pytest.mark.parametrize(("tiles", "blocks"), [(32, 128), (86, 132), (7, 40), (3, 132), (40, 8)])
def test_blocks_that_end_with_a_tile_add_up_its_sums(tiles, blocks):
    runs = runs_of(table_of(tiles, blocks))
    seen, takers = {}, {}
    for b, run in enumerate(runs):
        for (sharers, ends, output, first), following in zip(run, [*run[1:], None], strict=True):
            ends_here = following is None or following[2] != output
            assert bool(ends) == ends_here
            seen[output] = seen.get(output, 0) + 1
            if ends_here:
                assert b - first < sharers
                takers.setdefault(output, (sharers, ends, []))[2].append(following is None)
    assert seen == {128 * tile: 16 for tile in range(tiles)}
    for sharers, taking, last_of_run in takers.values():
        assert len(last_of_run) == sharers
        assert all(last_of_run[:-1])
        assert taking == max(1, sum(last_of_run))


@pytest.mark.parametrize("rows", [128, 256])
def test_units_of_trellises_are_the_circles_of_their_rows(rows):
    linears = ((700, (3, 5, 1, 8, 2)), (40, (2, 2, 4, 1, 7)), (256, (6, 3, 3, 2, 2)))
    bases = [[(5 * i + g) << 36 for g in range(5)] for i in range(3)]
    known = [(N, rates, own) for (N, rates), own in zip(linears, bases, strict=True)]
    table = trellis.schedule(known, rows, 7)
    assert np.ptp(table[:, 0, 0]) <= 1
    seen = []
    for block in table.view(np.uint32):
        for low, high, _, pair, width, live, output, *_ in block[1 : 1 + block[0, 0]].tolist():
            i, group = divmod(pair, 5)
            N, rates = linears[i]
            row = output - sum(n for n, _ in linears[:i])
            offset = (high << 32 | low) * 16 - bases[i][group]
            assert offset == row // 16 * 8 * tile_bytes(rates[group])
            assert width & 0xFFFF == rates[group]
            assert live & 0xFFFF == min(rows, N - row)
            seen.append((i, row, group))
    wanted = [
        (i, row, group)
        for i in range(3)
        for row in range(0, linears[i][0], rows)
        for group in range(5)
    ]
    assert seen == wanted


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_launch_hands_over_its_tables_and_what_it_is_given(dtype):
    table = np.zeros((7, 4, 12), dtype=np.int32)
    shape, rings = WarpgroupShape(2), plan_rings(4096, 32, 1)
    launches = {tokens: Launch(table, shape, rings, tokens, CPU) for tokens in (32, 64)}
    x, y = torch.zeros(70, 256, dtype=dtype), torch.zeros(70, 40, dtype=dtype)
    seen = []

    def function(arguments, *rest):
        seen.append((arguments._obj, rest))
        return len(seen) - 1

    launch = launches[64]
    how = {"groups": 3, "scaled": dtype == torch.bfloat16, "overlap": True, "pair_count": 3}
    launch(function, x, y, 256, 0.5, **how)
    ((found, rest),) = seen
    assert rest == (256, 0.5, 2, 64, 7, rings.total_bytes, 1, None)
    assert (found.x, found.y, found.units) == (x.data_ptr(), y.data_ptr(), launch.units.data_ptr())
    assert (found.tokens, found.x_stride, found.output_stride) == (70, 256, 40)
    assert (found.unit_capacity, found.pair_count) == (3, 3)
    assert (found.stage_count, found.slot_count) == (rings.stages, rings.slots)
    assert (found.factors is not None) == bool(found.is_bf16) == (dtype == torch.bfloat16)
    assert None not in (found.inputs, found.partial)
    left = workspace("batch partial", 1, CPU, fill=NOTHING)
    assert (left == NOTHING).all()
    assert left.numel() >= 7 * 2 * shape.rows * 64 * 4
    with pytest.raises(RuntimeError, match="64 tokens: cudaError 1"):
        launch(function, x, y, 256, 0.5, **how)


@pytest.mark.parametrize(
    ("tokens", "wanted"),
    [
        (1, [(0, 1, 32)]),
        (32, [(0, 32, 32)]),
        (33, [(0, 33, 64)]),
        (128, [(0, 128, 128)]),
        (300, [(0, 256, 128), (256, 300, 64)]),
        (384, [(0, 384, 128)]),
    ],
)
def test_tokens_beyond_full_launches_take_the_smallest_that_holds_them(tokens, wanted):
    launches = {size: size for size in (32, 64, 128)}
    found = [(rows.start, rows.stop, size) for rows, size in launches_for(launches, tokens)]
    assert found == wanted


def test_circles_are_copied_only_where_a_short_group_is_filled_up():
    whole, short = torch.ones(3, 8, 64, dtype=torch.uint8), torch.ones(3, 5, 64, dtype=torch.uint8)
    assert full_circles(whole) is whole
    filled = full_circles(short)
    assert torch.equal(filled[:, :5], short)
    assert not filled[:, 5:].any()
