"""Launch shapes of the kernels: a measured table, and rules for what it does not know.

`tiles.json` is written by `benchmarks/matmul.py --sweep` (CUDA) and `benchmarks/matmul_triton.py`,
with `--write`. It has a list of entries for each kernel, by the name of its file. An entry names
the GPU, the stacked rows N, the columns K, the widths present and, but for `dequantize_triton`, the
token bucket: of `decode_cuda` at most 2, 8, 16 or 32 tokens, of `decode_triton` at most 8, 16, 32
or 64, which are also those that a program takes.

Of the CUDA kernel a GPU that has no entry for a case takes the H100's; a case that is not in the
table gets the first shape that can run it. Of Triton's a GPU has its own entries or the rules here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from bitmill_kernels.hopper.schedule import WarpgroupShape
from bitmill_kernels.layout import WIDTHS
from bitmill_kernels.matmul import batch_cuda, dequantize_triton
from bitmill_kernels.matmul.decode_cuda import MAX_FUSED_TOKENS, SHAPES, DecodeShape, plan_shared
from bitmill_kernels.matmul.decode_triton import TOKEN_TILES, Tile
from bitmill_kernels.matmul.dequantize_triton import DequantizeTile
from bitmill_kernels.matmul.runtime import RuntimeWeight
from bitmill_kernels.matmul.units import divides_rows

STORED = Path(__file__).with_name("tiles.json")
TABLE_VERSION = 2
REFERENCE_GPU = "NVIDIA H100 80GB HBM3"
BLOCKS_PER_PROCESSOR = 3
MAX_SPLIT = 16

Shape = TypeVar("Shape")
Key = tuple[str, int, int, str, int | None]
"""GPU, N, K, widths present, token bucket."""


@dataclass(frozen=True)
class Table:
    """What `tiles.json` holds, kernel by kernel."""

    decode_cuda: Mapping[Key, DecodeShape]
    decode_triton: Mapping[Key, Tile]
    dequantize_triton: Mapping[Key, DequantizeTile]


@cache
def read_table(file: Path = STORED) -> Table:
    """The table in a file. Raises ValueError, which names the entry, for one that cannot be."""
    stored = json.loads(file.read_text())
    if stored["schema_version"] != TABLE_VERSION:
        raise ValueError(
            f"{file.name} has version {stored['schema_version']}: this code reads {TABLE_VERSION}"
        )
    return Table(
        _entries(stored["decode_cuda"], _compiled_shape),
        _entries(stored["decode_triton"], _decode_tile),
        _entries(stored["dequantize_triton"], _dequantize_tile),
    )


def block_shapes(
    weight: RuntimeWeight, gpu: str, per_processor: int, table: Table | None = None
) -> dict[int, DecodeShape]:
    """Shapes of the CUDA kernel by token bucket, for a GPU of this name and shared memory.

    The shape measured on this GPU or else on `REFERENCE_GPU`, else the first of `SHAPES` that can
    run the weight. A bucket that no shape can run is left out.
    """
    known = (table or read_table()).decode_cuda
    chosen: dict[int, DecodeShape] = {}
    for tokens, shapes in SHAPES.items():
        measured = (known.get(_key(weight, name, tokens)) for name in (gpu, REFERENCE_GPU))
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


def triton_tiles(
    weight: RuntimeWeight, gpu: str, processors: int, table: Table | None = None
) -> dict[int, Tile]:
    """Tiles of the Triton kernel by token tile, for a GPU of this name and of `processors` SMs.

    Those measured on this GPU that suit the weight, else those of `triton_rule`.
    """
    known = (table or read_table()).decode_triton
    measured = {tokens: known.get(_key(weight, gpu, tokens)) for tokens in TOKEN_TILES}
    suitable = {
        tokens: tile for tokens, tile in measured.items() if tile is not None and tile.suits(weight)
    }
    return triton_rule(weight, processors) | suitable


def triton_rule(weight: RuntimeWeight, processors: int) -> dict[int, Tile]:
    """Tiles where nothing was measured: 128 rows, and slices that fill every processor with three
    programs. Wider token tiles take eight warps: four would spill."""
    rows = 128
    split = slices(weight, rows, BLOCKS_PER_PROCESSOR * processors)
    warps_and_stages = {16: (4, 3), 32: (8, 3), 64: (8, 2)}
    return {tokens: Tile(rows, split, *how) for tokens, how in warps_and_stages.items()}


def slices(weight: RuntimeWeight, rows: int, programs: int) -> int:
    """Slices of the pairs with which tiles of so many rows are at most so many programs."""
    tiles = sum(member.rows // rows for member in weight.members)
    fewest = min(len(member.pairs) for member in weight.members)
    return max(1, min(MAX_SPLIT, fewest, programs // tiles))


def dequantize_tile(weight: RuntimeWeight, gpu: str, table: Table | None = None) -> DequantizeTile:
    """Tile of the Triton kernel that dequantizes: measured on this GPU, or the rule's."""
    known = (table or read_table()).dequantize_triton
    return known.get(_key(weight, gpu, None), dequantize_triton.RULE)


def widths_present(weight: RuntimeWeight) -> str:
    """The widths of a stack as digits, ascending: "234"."""
    return "".join(str(w) for i, w in enumerate(WIDTHS) if weight.width_mask >> i & 1)


def _key(weight: RuntimeWeight, gpu: str, tokens: int | None) -> Key:
    return gpu, weight.N, weight.K, widths_present(weight), tokens


def _entries(
    stored: list[dict[str, Any]], shape_of: Callable[[dict[str, Any]], Shape]
) -> dict[Key, Shape]:
    found: dict[Key, Shape] = {}
    for entry in stored:
        key = (entry["gpu"], entry["N"], entry["K"], entry["widths"], entry.get("tokens"))
        try:
            found[key] = shape_of(entry)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"launch shape {entry['shape']} of {key} cannot be: {error}; measure it anew with "
                "benchmarks/matmul.py or matmul_triton.py, or take the entry out"
            ) from error
    return found


def _compiled_shape(entry: dict[str, Any]) -> DecodeShape:
    warps, row_tiles, blocks = entry["shape"]
    compiled = SHAPES.get(entry["tokens"], ())
    if DecodeShape(warps, row_tiles, blocks) not in compiled:
        raise ValueError(
            f"the shapes compiled for {entry['tokens']} tokens are "
            f"{[[one.warps, one.row_tiles, one.blocks] for one in compiled]}"
        )
    fused = entry.get("fused", MAX_FUSED_TOKENS)
    if fused not in range(MAX_FUSED_TOKENS + 1):
        raise ValueError(f"fused is {fused!r}: it must be 0 to {MAX_FUSED_TOKENS} tokens")
    return DecodeShape(warps, row_tiles, blocks, fused)


def _decode_tile(entry: dict[str, Any]) -> Tile:
    if entry["tokens"] not in TOKEN_TILES:
        raise ValueError(f"tokens must be one of {TOKEN_TILES}")
    rows, split, warps, stages = entry["shape"]
    return Tile(rows, split, warps, stages)


def _dequantize_tile(entry: dict[str, Any]) -> DequantizeTile:
    rows, warps = entry["shape"]
    return DequantizeTile(rows, warps)
