"""What surrounds the CUDA decode kernel and needs no GPU: schedule, plan, compilation."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from bitmill_kernels import decode_cuda, tiles
from bitmill_kernels.decode_cuda import SHAPES, BlockShape, build_schedule, plan_shared
from bitmill_kernels.layout import WIDTHS
from bitmill_kernels.runtime import build_runtime
from kernel_cases import random_linear

CPU = torch.device("cpu")
H100_SHARED = 228 * 1024


def random_stack(seed):
    rng = np.random.default_rng(seed)
    K = int(rng.integers(1, 2500))
    weights = [
        random_linear(
            int(rng.integers(1, 700)), K, [int(w) for w in rng.choice(WIDTHS, -(-K // 128))]
        )
        for _ in range(rng.integers(1, 4))
    ]
    return build_runtime([weight for weight, *_ in weights], CPU), rng


@pytest.mark.parametrize("seed", range(12))
def test_every_unit_belongs_to_one_block_and_every_tile_knows_its_blocks(seed):
    weight, rng = random_stack(seed)
    rows = int(rng.choice([64, 128]))
    schedule = build_schedule(weight, rows, int(rng.integers(1, 300)))
    begin, end = schedule.blocks[:, 0], schedule.blocks[:, 1]
    units = sum(len(member.pairs) * member.rows // rows for member in weight.members)
    assert begin[0] == 0
    assert end[-1] == units
    assert (begin[1:] == end[:-1]).all()
    assert (end > begin).all()
    for _, pairs, _, first, _, _, first_block, count in schedule.tiles:
        touching = np.flatnonzero((begin < first + pairs) & (end > first))
        assert touching.tolist() == list(range(first_block, first_block + count))


@pytest.mark.parametrize("seed", range(12))
def test_a_chunk_of_activations_serves_every_unit_that_maps_to_it(seed):
    weight, rng = random_stack(seed)
    schedule = build_schedule(weight, 64, int(rng.integers(1, 200)))
    pair_of = {
        first + i: first_pair + i
        for first_pair, pairs, _, first, *_ in schedule.tiles.tolist()
        for i in range(pairs)
    }
    for begin, end, tile, chunks, row, pair_of_unit, tile_end, _ in schedule.blocks.tolist():
        first_pair, pairs, tile_row, first, *_ = schedule.tiles[tile].tolist()
        assert (row, pair_of_unit, tile_end) == (tile_row, first_pair - first, first + pairs)
        for unit in range(begin, end):
            assert pair_of[unit] == pair_of[begin + (unit - begin) % chunks]


def test_blocks_share_the_bytes_evenly():
    weight, *_ = random_linear(4096, 2048, (2, 8, 3, 4) * 4)
    runtime = build_runtime([weight], CPU)
    schedule = build_schedule(runtime, 128, 50)
    widths = np.array([pair.width for pair in runtime.members[0].pairs] * 32)
    loads = [widths[begin:end].sum() + end - begin for begin, end, *_ in schedule.blocks]
    assert max(loads) <= sum(loads) / 50 + 9


def test_an_argument_structure_has_the_size_of_the_kernels():
    source = Path(decode_cuda.__file__).with_name("decode_cuda.cu").read_text()
    body = source.split("struct DecodeArguments {")[1].split("};")[0]
    fields = [line.split("//")[0].strip() for line in body.splitlines() if ";" in line]
    names = [field.rstrip(";").split()[-1].lstrip("*") for field in fields]
    assert names == [name for name, _ in decode_cuda._Arguments._fields_]


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


def test_a_shape_that_does_not_fit_is_recognized():
    weight, *_ = random_linear(128, 512, (8,) * 4)
    runtime = build_runtime([weight], CPU)
    assert plan_shared(runtime, BlockShape(4, 2, 3), 16, 0, H100_SHARED) is None


def test_the_stored_table_names_compiled_shapes():
    for (_, _, _, _, tokens), shape in tiles._table().items():
        assert shape in SHAPES[tokens]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")
def test_the_kernel_compiles_for_sm_90_with_few_spills(tmp_path):
    source = Path(decode_cuda.__file__).with_name("decode_cuda.cu")
    flags = ["-std=c++17", "-O3", "-gencode", "arch=compute_90,code=sm_90", "-Xptxas", "-v"]
    command = ["nvcc", *flags, "-cubin", "-o", tmp_path / "decode.cubin", source]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    spilled = [
        int(line.split("bytes spill stores")[0].split(",")[-1])
        for line in done.stderr.splitlines()
        if "bytes spill stores" in line
    ]
    assert len(spilled) == 9
    assert max(spilled) <= 300
