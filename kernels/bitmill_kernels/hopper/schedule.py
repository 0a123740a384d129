"""Tables of the CUDA kernels that multiply packed weights (`units.h`), and how they share memory.

The units of a launch, (tile of rows, some groups), tile by tile, are cut into one run per resident
block, of equal cost.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

SHARED_KEPT_FREE = 3072
RESERVED_SHARED_BYTES = 1024
MAX_SHARED_BYTES = 227 * 1024
MAX_STAGES = 6
MAX_SLOTS = 16
BARRIER_BYTES = 1024

BATCH_TOKENS = {
    128: ((1 << 27, 512), (1 << 25, 256), (0, 128)),
    256: ((1 << 27, 1024), (1 << 24, 256), (0, 128)),
}
"""By most tokens of a launch, weights from which `wgmma` is faster than a dequantized weight, up to
so many tokens."""


def tokens_of(limits: Sequence[tuple[int, int]], weights: int) -> int:
    """The tokens that stand beside the first number of weights that is reached; the last is 0."""
    return next(tokens for least, tokens in limits if weights >= least)


def batch_tokens(weights: int, launch: int) -> int:
    """Up to so many tokens `wgmma` is faster than a dequantized weight, for so many weights.

    launch: most tokens of a launch, a key of `BATCH_TOKENS`. Measured on an H200.
    """
    return tokens_of(BATCH_TOKENS[launch], weights)


DECODE_TOKENS = ((1 << 27, 16), (0, 8))
"""Weights from which the decode kernel is faster than `wgmma`, up to so many tokens."""


def decode_tokens(weights: int) -> int:
    """Up to so many tokens the decode kernel is faster than `wgmma`, for so many weights.

    Measured on an H200 (`benchmarks/matmul.py --kernels batch --sweep`).
    """
    return tokens_of(DECODE_TOKENS, weights)


WHOLE_TILES_FROM = 0.95
"""Blocks are left idle down to this part of them where tiles then end with blocks."""


class Arguments(ctypes.Structure):
    """`DecodeArguments` of units.h, field by field."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                "planes",
                "grid",
                "pairs",
                "units",
                "x",
                "order",
                "inputs",
                "factors",
                "row_scales",
                "bias",
                "partial",
                "counters",
                "y",
            )
        ),
        *(
            (name, ctypes.c_int)
            for name in (
                "pair_count",
                "tokens",
                "x_stride",
                "output_stride",
                "chunk_capacity",
                "unit_capacity",
                "stage_count",
                "stage_bytes",
                "slot_count",
                "is_bf16",
            )
        ),
    )


@dataclass(frozen=True)
class BlockShape:
    """warps x row_tiles x 16 rows a tile, `blocks` resident on each multiprocessor."""

    warps: int
    row_tiles: int
    blocks: int

    @property
    def rows(self) -> int:
        """Of a tile."""
        return self.warps * self.row_tiles * 16


@dataclass(frozen=True)
class WarpgroupShape:
    """`groups` warpgroups of 64 rows each; one block on each multiprocessor."""

    groups: int

    @property
    def rows(self) -> int:
        """Of a tile."""
        return self.groups * 64


@dataclass(frozen=True)
class Rings:
    """Shared memory of a block of `wgmma.h`: stages of weights, slots of activations, all bytes."""

    stages: int
    stage_bytes: int
    slots: int
    total_bytes: int


def plan_rings(stage_bytes: int, tokens: int, groups: int) -> Rings | None:
    """How a block uses shared memory, or None where too little fits.

    stage_bytes: of the largest unit. A slot holds what `tokens` of a launch have of one of a unit's
    `groups`. There must be two stages, and a slot more than a unit has groups: a warp waits for all
    activations of a unit before it gives back the last ones of the unit before.
    """
    slot_bytes = group_bytes(tokens)
    fixed = BARRIER_BYTES
    free = MAX_SHARED_BYTES - fixed
    stages = max(2, min(MAX_STAGES, free // (stage_bytes + groups * slot_bytes)))
    slots = min(MAX_SLOTS, (free - stages * stage_bytes) // slot_bytes)
    if slots < groups + 1:
        return None
    return Rings(stages, stage_bytes, slots, fixed + stages * stage_bytes + slots * slot_bytes)


def group_bytes(tokens: int) -> int:
    """Bytes of one group's activations: 128 columns of each token, in half precision."""
    return 256 * tokens


def unit_table(unit: Mapping[str, np.ndarray], cost: np.ndarray, block_count: int) -> np.ndarray:
    """Rows i32 [blocks, 1 + capacity, 12]: for each block a `BlockRow` and its `UnitRow`s.

    unit: for each unit in turn low, high, grid (offsets in 16 bytes), pair, width, live_rows,
    output, tile, first [2] and live [2] (columns of its groups). cost: of each, in any measure. The
    second number of a `BlockRow` is left 0. There are fewer blocks than `block_count` if units are
    fewer.
    """
    starts = equal_runs(cost, block_count)
    count = len(cost)
    block = np.searchsorted(starts, np.arange(count), side="right") - 1
    ends_block = np.diff(block, append=-1) != 0
    ends_tile = np.diff(unit["tile"], append=-1) != 0
    first_block = block[np.searchsorted(unit["tile"], unit["tile"], side="left")]
    last_unit = np.searchsorted(unit["tile"], unit["tile"], side="right") - 1
    last_block = block[last_unit]
    takers = np.maximum(last_block - first_block + ends_block[last_unit], 1)
    fields = [
        *(unit["low"], unit["high"], unit["grid"], unit["pair"]),
        unit["width"] | np.where(ends_tile | ends_block, takers, 0) << 16,
        unit["live_rows"] | (last_block - first_block + 1) << 16,
        *(unit["output"], first_block),
        *unit["first"],
        unit["live"][0] | unit["live"][1] << 16,
        unit["width"],
    ]
    lengths = np.diff(starts, append=count)
    table = np.zeros((len(starts), 1 + int(lengths.max()), len(fields)), dtype=np.uint32)
    table[block, 1 + np.arange(count) - starts[block]] = np.stack(fields, axis=1)
    table[:, 0, 0] = lengths
    return table.view(np.int32)


def whole_tiles(tiles: int, processors: int) -> int:
    """Blocks that share so many tiles of equal cost: all processors, or few less where each tile is
    then a whole number of blocks, which share fewer sums."""
    whole = processors // tiles * tiles
    return whole if whole >= WHOLE_TILES_FROM * processors else processors


def equal_runs(cost: np.ndarray, count: int) -> np.ndarray:
    """First unit of each of `count` non-empty consecutive runs of about equal cost."""
    count = min(count, len(cost))
    before = np.concatenate([[0.0], np.cumsum(cost)])
    starts = np.searchsorted(before, before[-1] * np.arange(count) / count - 1e-9)
    index = np.arange(count)
    distinct: np.ndarray = np.maximum.accumulate(starts - index) + index
    return np.asarray(np.minimum(distinct, len(cost) - count + index))
