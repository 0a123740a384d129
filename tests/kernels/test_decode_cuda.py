"""What surrounds the CUDA decode kernel and needs no GPU: schedule and plan."""

import numpy as np
import pytest
import torch

from bitmill_kernels.hopper import schedule as hopper_schedule
from bitmill_kernels.hopper.building import HEADERS
from bitmill_kernels.hopper.schedule import BlockShape
from bitmill_kernels.layout import PLANES, WIDTHS, group_columns
from bitmill_kernels.matmul import tiles
from bitmill_kernels.matmul.decode_cuda import SHAPES, fused_tokens, plan_shared
from bitmill_kernels.matmul.runtime import build_runtime
from bitmill_kernels.matmul.units import build_schedule
from kernel_cases import random_linear, random_planes

CPU = torch.device("cpu")
H100_SHARED = 228 * 1024


def random_stack(seed):
    rng = np.random.default_rng(seed)
    K = int(rng.integers(1, 2500))
    weights = [
        random_linear(
            int(rng.integers(1, 700)), K, [int(w) for w in rng.choice(list(PLANES), -(-K // 128))]
        )
        for _ in range(rng.integers(1, 4))
    ]
    return build_runtime([weight for weight, *_ in weights], CPU), rng


def block_units(schedule):
    """(header, unit rows as a dict of fields) of each block."""
    for header, *rows in schedule.units:
        cells = np.array(rows[: header[0]]).T
        yield (
            header,
            {
                **dict(zip(("low", "high", "grid", "pair"), cells[:4], strict=True)),
                **{"width": cells[4] & 0xFFFF, "ends": cells[4] >> 16},
                **{"live_rows": cells[5] & 0xFFFF, "blocks": cells[5] >> 16},
                **{"output": cells[6], "first_block": cells[7], "first": cells[8:10]},
                "live": np.stack([cells[10] & 0xFFFF, cells[10] >> 16]),
            },
        )


@pytest.mark.parametrize("seed", range(12))
def test_every_unit_belongs_to_one_block_and_knows_the_blocks_of_its_tile(seed):
    weight, rng = random_stack(seed)
    rows = int(rng.choice([64, 128]))
    schedule = build_schedule(weight, rows, int(rng.integers(1, 300)), 1.0)
    seen = []
    for block, (_, unit) in enumerate(block_units(schedule)):
        inside = (block >= unit["first_block"]) & (block < unit["first_block"] + unit["blocks"])
        assert inside.all()
        seen += zip(unit["output"].tolist(), unit["pair"].tolist(), strict=True)
        changes = np.flatnonzero(np.diff(unit["output"])).tolist()
        assert np.flatnonzero(unit["ends"]).tolist() == [*changes, len(unit["ends"]) - 1]
    expected = []
    first_pair = 0
    for member in weight.members:
        for row in range(0, member.rows, rows):
            expected += [
                (member.first_output + row, first_pair + i) for i in range(len(member.pairs))
            ]
        first_pair += len(member.pairs)
    assert seen == expected


@pytest.mark.parametrize("seed", range(12))
def test_a_unit_points_at_the_bytes_of_its_rows(seed):
    weight, rng = random_stack(seed)
    rows = int(rng.choice([64, 128]))
    pairs = [(member, pair) for member in weight.members for pair in member.pairs]
    for _, unit in block_units(build_schedule(weight, rows, 100, 1.0)):
        for i, index in enumerate(unit["pair"]):
            member, pair = pairs[index]
            row = unit["output"][i] - member.first_output
            low_bits, *high_bits = PLANES[pair.width]
            assert unit["width"][i] == pair.width
            assert unit["low"][i] * 16 == pair.low + row * 32 * low_bits
            assert unit["high"][i] * 16 == pair.high + row * 32 * sum(high_bits)
            assert unit["grid"][i] * 16 == pair.grid + row * 8
            assert unit["live_rows"][i] == min(rows, max(0, member.N - row))
            columns = group_columns(weight.K)
            for half, group in enumerate(pair.groups):
                assert unit["live"][half][i] == (0 if group is None else columns[group])
                assert unit["first"][half][i] == (0 if group is None else group * 128)


@pytest.mark.parametrize("seed", range(12))
def test_a_chunk_of_activations_serves_every_unit_that_maps_to_it(seed):
    weight, rng = random_stack(seed)
    for header, unit in block_units(build_schedule(weight, 64, int(rng.integers(1, 200)), 1.0)):
        count, chunks = header[:2]
        assert (unit["pair"] == unit["pair"][np.arange(count) % chunks]).all()


def test_blocks_share_the_bytes_evenly():
    weight, *_ = random_linear(4096, 2048, (2, 8, 3, 4) * 4)
    runtime = build_runtime([weight], CPU)
    units = [unit for _, unit in block_units(build_schedule(runtime, 128, 50, 1.0))]
    loads = [unit["width"].sum() + len(unit["width"]) for unit in units]
    assert max(loads) <= sum(loads) / 50 + 9


def test_an_argument_structure_has_the_size_of_the_kernels():
    source = HEADERS[0].read_text()
    body = source.split("struct DecodeArguments {")[1].split("};")[0]
    fields = [line.split("//")[0].strip() for line in body.splitlines() if ";" in line]
    names = [field.rstrip(";").split()[-1].lstrip("*") for field in fields]
    assert names == [name for name, _ in hopper_schedule.Arguments._fields_]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("N", [100, 256, 896])
def test_every_weight_gets_a_shape_that_fits_for_every_bucket(width, N):
    weight, *_ = random_linear(N, 512, (width,) * 4)
    runtime = build_runtime([weight], CPU)
    shapes = tiles.block_shapes(runtime, "a GPU without measurements", H100_SHARED)
    assert list(shapes) == list(SHAPES)
    for tokens, shape in shapes.items():
        plan = plan_shared(runtime, shape, tokens, 0, H100_SHARED)
        assert plan is not None
        assert runtime.members[0].rows % shape.rows == 0
        assert plan.total_bytes * shape.blocks <= H100_SHARED


def test_a_gpu_without_measurements_takes_the_shapes_of_another():
    weight = build_runtime([random_planes(4096, 4096, (3, 2, 4, 3) * 8, CPU)], CPU)
    measured = {
        tokens: shape
        for (gpu, N, K, widths, tokens), shape in tiles.read_table().decode_cuda.items()
        if (gpu, N, K, widths) == (tiles.REFERENCE_GPU, 4096, 4096, "234")
    }
    found = tiles.block_shapes(weight, "a GPU without measurements", H100_SHARED)
    assert measured
    assert measured.items() <= found.items()
    assert any(shape != SHAPES[tokens][0] for tokens, shape in measured.items())


def test_a_shape_that_does_not_fit_is_recognized():
    weight, *_ = random_linear(128, 512, (8,) * 4)
    runtime = build_runtime([weight], CPU)
    assert plan_shared(runtime, BlockShape(4, 2, 3), 16, 0, H100_SHARED) is None


@pytest.mark.parametrize(
    ("bucket", "chunks", "blocks", "tokens"),
    [
        *((2, 15, 1, 2), (2, 16, 1, 0), (2, 15, 4, 2), (2, 15, 5, 0)),
        *((8, 3, 2, 8), (8, 3, 3, 4), (8, 4, 1, 4), (8, 9, 1, 2), (8, 16, 1, 0), (16, 1, 1, 0)),
    ],
)
def test_blocks_convert_few_tokens_of_few_pairs(bucket, chunks, blocks, tokens):
    fused = {2: (15, 60), 4: (8, 16), 8: (3, 6)}
    assert fused_tokens(fused, bucket, chunks, blocks) == tokens
