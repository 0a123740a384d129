"""Launch shapes of the decode kernels: a measured table, and a rule for what it does not know.

`tiles.json` is written by `benchmarks/matmul.py --sweep --write`. Its entries name the GPU, the
stacked rows N, the columns K, the widths present, and the token bucket (at most 2, 8, 16 or 32
tokens). A GPU that has no entry for a case takes the H100's; a case that is not in the table gets
the first shape that can run it.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from bitmill_kernels.hopper.schedule import BlockShape, WarpgroupShape
from bitmill_kernels.layout import WIDTHS
from bitmill_kernels.matmul import batch_cuda
from bitmill_kernels.matmul.decode_cuda import SHAPES, plan_shared
from bitmill_kernels.matmul.decode_triton import TOKEN_TILES, Tile
from bitmill_kernels.matmul.runtime import RuntimeWeight
from bitmill_kernels.matmul.units import divides_rows

TABLE_VERSION = 1
REFERENCE_GPU = "NVIDIA H100 80GB HBM3"
BLOCKS_PER_PROCESSOR = 3
MAX_SPLIT = 16


def block_shapes(weight: RuntimeWeight, gpu: str, per_processor: int) -> dict[int, BlockShape]:
    """Shapes of the CUDA kernel by token bucket, for a GPU of this name and shared memory.

    The shape measured on this GPU or else on `REFERENCE_GPU`, else the first of `SHAPES` that can
    run the weight. A bucket that no shape can run is left out.
    """
    widths = widths_present(weight)
    chosen: dict[int, BlockShape] = {}
    for tokens, shapes in SHAPES.items():
        case = (weight.N, weight.K, widths, tokens)
        measured = (_table().get((name, *case)) for name in (gpu, REFERENCE_GPU))
        for shape in (*measured, *shapes):
            if (
                shape is not None
                and divides_rows(weight, shape.rows)
                and plan_shared(weight, shape, tokens, 0, per_processor) is not None
            ):
                chosen[tokens] = shape
                break
    return chosen


def batch_shapes(weight: RuntimeWeight) -> dict[int, WarpgroupShape]:
    """Shapes of the batch kernel by tokens of a launch: the fastest that fits of each."""
    return {
        tokens: shape
        for tokens in batch_cuda.SHAPES
        for shape in reversed(batch_cuda.by_preference(weight.N, tokens))
        if batch_cuda.plan(weight, shape, tokens) is not None
    }


def triton_tiles(weight: RuntimeWeight, processors: int) -> dict[int, Tile]:
    """Tiles of the Triton kernel for each of its token tiles, for a GPU of `processors` SMs.

    128 rows and as many slices of the pairs as fill every processor with three programs. Wider
    token tiles take eight warps: four would spill.
    """
    rows = 128
    tiles = sum(member.rows // rows for member in weight.members)
    fewest = min(len(member.pairs) for member in weight.members)
    split = max(1, min(MAX_SPLIT, fewest, BLOCKS_PER_PROCESSOR * processors // tiles))
    warps_and_stages = {16: (4, 3), 32: (8, 3), 64: (8, 2)}
    return {tokens: Tile(rows, split, *warps_and_stages[tokens]) for tokens in TOKEN_TILES}


def widths_present(weight: RuntimeWeight) -> str:
    """The widths of a stack as digits, ascending: "234"."""
    return "".join(str(w) for i, w in enumerate(WIDTHS) if weight.width_mask >> i & 1)


@cache
def _table() -> dict[tuple[str, int, int, str, int], BlockShape]:
    stored = json.loads(Path(__file__).with_name("tiles.json").read_text())
    if stored["schema_version"] != TABLE_VERSION:
        raise ValueError(
            f"tiles.json has version {stored['schema_version']}: this code reads {TABLE_VERSION}"
        )
    return {_key(entry): BlockShape(*entry["shape"]) for entry in stored["entries"]}


def _key(entry: dict[str, Any]) -> tuple[str, int, int, str, int]:
    return entry["gpu"], entry["N"], entry["K"], entry["widths"], entry["tokens"]
