"""Loading, scheduling and launching of the CUDA decode kernel (`decode_cuda.cu`).

The kernel is compiled by nvcc at first use, through torch's extension loader, and called through
ctypes: it knows no torch types, so one build serves every torch version. On machines without
nvcc, BITMILL_DECODE_LIBRARY names a library that was built elsewhere.

Schedule: the units of a launch, (tile of rows, pair of groups), tile by tile, are cut into one
run per resident block, of equal cost. A unit's cost is its bytes plus a constant for the work
that does not depend on its width.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bitmill_kernels.layout import GROUP_SIZE, group_columns
from bitmill_kernels.runtime import Member, Pair, RuntimeWeight
from bitmill_kernels.workspace import workspace

TOKEN_BUCKETS = (2, 8, 16, 32)
"""A launch shape is chosen for the smallest bucket that holds the tokens."""

FUSED_TOKENS = 2
"""So many tokens are converted by every block for itself, more by the prologue kernel."""

SMALLEST_CAPABILITY = (9, 0)
SHARED_KEPT_FREE = 3072
RESERVED_SHARED_BYTES = 1024
MAX_SHARED_BYTES = 227 * 1024
MAX_CHUNK_BYTES = 24 * 1024
MAX_STAGES = 8
PAIR_ROW_BYTES = 32
UNIT_COST_IN_WIDTHS = 1.0

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockShape:
    """warps x row_tiles x 16 rows a tile, `blocks` resident on each multiprocessor."""

    warps: int
    row_tiles: int
    blocks: int

    @property
    def rows(self) -> int:
        return self.warps * self.row_tiles * 16


_NARROW = (BlockShape(8, 2, 1), BlockShape(4, 2, 3), BlockShape(4, 1, 4))
SHAPES = {2: _NARROW, 8: _NARROW, 16: _NARROW, 32: (BlockShape(4, 2, 2), BlockShape(8, 2, 1))}
"""The shapes that are compiled, by token bucket, as listed at the end of `decode_cuda.cu`; the
first was the fastest over all cases measured on an H100."""


class _Arguments(ctypes.Structure):
    """`DecodeArguments` of decode_cuda.cu, field by field."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                "planes",
                "grid",
                "pairs",
                "tiles",
                "blocks",
                "x",
                "order",
                "inputs",
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
                "stage_count",
                "stage_bytes",
                "is_bf16",
            )
        ),
    )


@dataclass(frozen=True)
class SharedPlan:
    """Shared memory of one block: stages of the ring, bytes of each, and bytes of everything."""

    stages: int
    stage_bytes: int
    total_bytes: int


def plan_shared(
    weight: RuntimeWeight, shape: BlockShape, tokens: int, chunks: int, per_processor: int
) -> SharedPlan | None:
    """How a block of a shape uses shared memory, or None where two stages do not fit.

    tokens: the bucket. chunks: pairs whose activations the block converts itself, or 0 where the
    ring carries them. per_processor: bytes of shared memory on a multiprocessor.
    """
    staged = 0 if chunks else _input_bytes(tokens)
    widest = max(pair.width for member in weight.members for pair in member.pairs)
    stage_bytes = -(-(staged + shape.rows * (8 + 32 * widest)) // 128) * 128
    available = (per_processor - SHARED_KEPT_FREE) // shape.blocks - RESERVED_SHARED_BYTES
    fixed = 16 * MAX_STAGES + PAIR_ROW_BYTES * weight.pair_count + 128
    fixed += chunks * _input_bytes(tokens)
    stages = min(MAX_STAGES, (min(available, MAX_SHARED_BYTES) - fixed) // stage_bytes)
    return SharedPlan(stages, stage_bytes, fixed + stages * stage_bytes) if stages >= 2 else None


def divides_rows(weight: RuntimeWeight, shape: BlockShape) -> bool:
    """Whether a shape's tiles end where the members' padded rows end; others cannot be used."""
    return all(member.rows % shape.rows == 0 for member in weight.members)


@dataclass(frozen=True)
class Schedule:
    """Host tables i32 of one launch shape: pairs [P, 8], tiles [tiles, 8], blocks [blocks, 8]."""

    pairs: np.ndarray
    tiles: np.ndarray
    blocks: np.ndarray


def build_schedule(weight: RuntimeWeight, rows: int, block_count: int) -> Schedule:
    """Share the units of all members out among `block_count` blocks, fewer if units are fewer."""
    pairs = [
        _pair_row(pair, group_columns(weight.K))
        for member in weight.members
        for pair in member.pairs
    ]
    tiles: list[list[int]] = []
    costs: list[np.ndarray] = []
    first_pair = first_unit = 0
    for member in weight.members:
        cost = np.array([pair.width + UNIT_COST_IN_WIDTHS for pair in member.pairs])
        for row in range(0, member.rows, rows):
            place = [first_pair, len(cost), row, first_unit]
            tiles.append([*place, member.first_output + row, _live_rows(member, row, rows), 0, 0])
            costs.append(cost)
            first_unit += len(cost)
        first_pair += len(member.pairs)
    starts = _equal_runs(np.concatenate(costs), block_count)
    table = np.array(tiles, dtype=np.int32)
    last_unit = table[:, 3] + table[:, 1] - 1
    table[:, 6] = np.searchsorted(starts, table[:, 3], side="right") - 1
    table[:, 7] = np.searchsorted(starts, last_unit, side="right") - table[:, 6]
    return Schedule(np.array(pairs, dtype=np.int32), table, _blocks(starts, table))


def _pair_row(pair: Pair, columns: list[int]) -> list[int]:
    first = [0 if group is None else group * GROUP_SIZE for group in pair.groups]
    live = [0 if group is None else columns[group] for group in pair.groups]
    return [pair.width, pair.low // 16, pair.high // 16, pair.grid // 16, *first, *live]


def _live_rows(member: Member, row: int, rows: int) -> int:
    return max(0, min(rows, member.N - row))


def _blocks(starts: np.ndarray, tiles: np.ndarray) -> np.ndarray:
    """Rows (begin, end, tile, chunks, row, pair of unit 0, end of the tile, 0) of each block.

    A block that stays in one member needs each of its pairs' activations once.
    """
    ends = np.append(starts[1:], tiles[-1, 3] + tiles[-1, 1])
    first = np.searchsorted(tiles[:, 3], starts, side="right") - 1
    last = np.searchsorted(tiles[:, 3], ends - 1, side="right") - 1
    same_member = tiles[first, 0] == tiles[last, 0]
    chunks = np.where(same_member, np.minimum(ends - starts, tiles[first, 1]), ends - starts)
    columns = [
        *(starts, ends, first, chunks, tiles[first, 2]),
        *(tiles[first, 0] - tiles[first, 3], tiles[first, 3] + tiles[first, 1]),
        np.zeros_like(starts),
    ]
    return np.stack(columns, axis=1).astype(np.int32)


def _equal_runs(cost: np.ndarray, count: int) -> np.ndarray:
    """First unit of each of `count` non-empty consecutive runs of about equal cost."""
    count = min(count, len(cost))
    before = np.concatenate([[0.0], np.cumsum(cost)])
    starts = np.searchsorted(before, before[-1] * np.arange(count) / count - 1e-9)
    index = np.arange(count)
    distinct: np.ndarray = np.maximum.accumulate(starts - index) + index
    return np.asarray(np.minimum(distinct, len(cost) - count + index))


class CudaDecoder:
    """y [T, N] = x W^T for 1 to 32 tokens with the compiled kernel; raises where it cannot load."""

    def __init__(self, weight: RuntimeWeight, shapes: Mapping[int, BlockShape]) -> None:
        """shapes: by token bucket, ascending; all tables and workspaces are built here.

        Raises ValueError for a shape that cannot run the weight.
        """
        self._library = load_library()
        self._weight = weight
        self._planes = weight.planes.data_ptr()
        self._grid = weight.grid.data_ptr()
        self._order = None if weight.order is None else weight.order.data_ptr()
        self._launches = {tokens: _Launch(weight, shapes[tokens], tokens) for tokens in shapes}
        self.max_tokens = max(shapes)

    def __call__(self, x: Tensor, bias: Tensor | None, y: Tensor, *, overlap: bool = True) -> None:
        """x f16 or bf16 [T, K] with contiguous rows, y of its dtype [T, N] contiguous.

        overlap: let the launch begin while the one before it on the stream drains.
        """
        tokens = x.shape[0]
        launch = next(found for bucket, found in self._launches.items() if bucket >= tokens)
        arguments = _Arguments(
            planes=self._planes,
            grid=self._grid,
            x=x.data_ptr(),
            order=self._order,
            bias=None if bias is None else bias.data_ptr(),
            y=y.data_ptr(),
            tokens=tokens,
            x_stride=x.stride(0),
            output_stride=y.stride(0),
            is_bf16=int(x.dtype == torch.bfloat16),
        )
        launch.fill(arguments)
        status = self._library.bitmill_decode(
            ctypes.byref(arguments),
            launch.shape.warps,
            launch.shape.row_tiles,
            launch.shape.blocks,
            launch.block_count,
            launch.shared_bytes,
            int(overlap),
            torch.cuda.current_stream(x.device).cuda_stream,
        )
        if status != 0:
            raise RuntimeError(
                f"the CUDA decode kernel failed to launch with {launch.shape}: cudaError {status}"
            )


class _Launch:
    """Tables, workspace and shared memory of one block shape and token bucket."""

    def __init__(self, weight: RuntimeWeight, shape: BlockShape, tokens: int) -> None:
        device = weight.planes.device
        properties = torch.cuda.get_device_properties(device)
        self.shape = shape
        schedule = build_schedule(
            weight, shape.rows, properties.multi_processor_count * shape.blocks
        )
        self.block_count = len(schedule.blocks)
        self._tables = [
            torch.from_numpy(table).to(device)
            for table in (schedule.pairs, schedule.tiles, schedule.blocks)
        ]
        counters = len(schedule.tiles) * shape.warps
        self._counters = torch.zeros(counters, dtype=torch.int32, device=device)
        cells = shape.rows * 8 * -(-tokens // 8)
        self._partial = workspace("decode partial", self.block_count * 2 * cells * 4, device)
        shared = properties.shared_memory_per_multiprocessor
        self._chunks = int(schedule.blocks[:, 3].max()) if tokens <= FUSED_TOKENS else 0
        plan = None
        if 0 < self._chunks * _input_bytes(tokens) <= MAX_CHUNK_BYTES:
            plan = plan_shared(weight, shape, tokens, self._chunks, shared)
        if plan is None:
            self._chunks = 0
            plan = plan_shared(weight, shape, tokens, 0, shared)
        if plan is None or not divides_rows(weight, shape):
            raise ValueError(
                f"{shape} cannot run {tokens} tokens of N={weight.N}, K={weight.K}: two stages do "
                "not fit shared memory, or its tiles do not divide the padded rows"
            )
        self._plan = plan
        self.shared_bytes = plan.total_bytes
        self._inputs: Tensor | None = None
        if not self._chunks:
            size = weight.pair_count * _input_bytes(tokens)
            self._inputs = workspace("decode inputs", size, device)

    def fill(self, arguments: _Arguments) -> None:
        pairs, tiles, blocks = self._tables
        arguments.pairs, arguments.tiles = pairs.data_ptr(), tiles.data_ptr()
        arguments.blocks, arguments.partial = blocks.data_ptr(), self._partial.data_ptr()
        arguments.counters = self._counters.data_ptr()
        arguments.inputs = None if self._inputs is None else self._inputs.data_ptr()
        arguments.pair_count = pairs.shape[0]
        arguments.chunk_capacity = self._chunks
        arguments.stage_count = self._plan.stages
        arguments.stage_bytes = self._plan.stage_bytes


def _input_bytes(tokens: int) -> int:
    """Bytes of one pair's activations: 8 vectors of 64 bytes a token, then (scale, sum) twice."""
    return 528 * tokens


def available(device: torch.device) -> bool:
    """Whether the kernel can run on this device: Hopper or later, and a compiler to build it."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < SMALLEST_CAPABILITY:
        return False
    try:
        load_library()
    except (OSError, RuntimeError) as error:
        _say_unavailable(str(error).splitlines()[0])
        return False
    return True


@cache
def load_library() -> ctypes.CDLL:
    """Compile the kernel if need be and load it. Raises RuntimeError or OSError where it cannot."""
    library = ctypes.CDLL(os.environ.get("BITMILL_DECODE_LIBRARY") or _build())
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.bitmill_decode.argtypes = [pointer] + [integer] * 6 + [pointer]
    return library


def _build() -> str:
    from torch.utils.cpp_extension import get_default_build_root, load

    folder = Path(get_default_build_root()) / "bitmill_decode"
    os.makedirs(folder, exist_ok=True)
    load(
        "bitmill_decode",
        [str(Path(__file__).with_name("decode_cuda.cu"))],
        extra_cuda_cflags=["-O3", "-std=c++17"],
        build_directory=str(folder),
        is_python_module=False,
    )
    return str(folder / "bitmill_decode.so")


@cache
def _say_unavailable(reason: str) -> None:
    _LOG.warning("the CUDA decode kernel is unavailable (%s): Triton decodes instead", reason)
