"""Scheduling and launching of the CUDA decode kernel (`decode_cuda.cu`).

Schedule: the units of a launch, (tile of rows, pair of groups), tile by tile, are cut into one
run per resident block, of equal cost. A unit's cost is its bytes plus a constant for the work
that does not depend on its width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bitmill_kernels.layout import GROUP_SIZE, PLANES, group_columns
from bitmill_kernels.matmul.cuda_library import load_library
from bitmill_kernels.matmul.runtime import Pair, RuntimeWeight
from bitmill_kernels.matmul.workspace import workspace

TOKEN_BUCKETS = (2, 8, 16, 32)
"""A launch shape is chosen for the smallest bucket that holds the tokens."""

FUSED_TOKENS = 2
"""So many tokens are converted by every block for itself, more by the prologue kernel."""

SHARED_KEPT_FREE = 3072
RESERVED_SHARED_BYTES = 1024
MAX_SHARED_BYTES = 227 * 1024
MAX_CHUNK_BYTES = 16 * 1024
MAX_STAGES = 8
UNIT_COST_IN_WIDTHS = 1.0


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
                "units",
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
                "unit_capacity",
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
    fixed = 16 * MAX_STAGES + 128 + chunks * _input_bytes(tokens)
    stages = min(MAX_STAGES, (min(available, MAX_SHARED_BYTES) - fixed) // stage_bytes)
    return SharedPlan(stages, stage_bytes, fixed + stages * stage_bytes) if stages >= 2 else None


def divides_rows(weight: RuntimeWeight, shape: BlockShape) -> bool:
    """Whether a shape's tiles end where the members' padded rows end; others cannot be used."""
    return all(member.rows % shape.rows == 0 for member in weight.members)


@dataclass(frozen=True)
class Schedule:
    """Host tables i32 of one launch shape, as `decode_cuda.cu` reads them.

    pairs: [P, 5] = width, first packed columns of the two groups, live columns of both.
    units: [blocks, 1 + capacity, 12], for each block a `BlockRow` and its `UnitRow`s.
    """

    pairs: np.ndarray
    units: np.ndarray

    @property
    def capacity(self) -> int:
        """Most units of a block."""
        return int(self.units.shape[1]) - 1

    @property
    def chunks(self) -> int:
        """Most pairs whose activations a block needs."""
        return int(self.units[:, 0, 1].max())


def build_schedule(weight: RuntimeWeight, rows: int, block_count: int) -> Schedule:
    """Share the units of all members out among `block_count` blocks, fewer if units are fewer."""
    columns = group_columns(weight.K)
    pairs = np.array(
        [_pair_row(pair, columns) for member in weight.members for pair in member.pairs],
        dtype=np.int32,
    )
    unit = _units(weight, rows)
    starts = _equal_runs(pairs[unit["pair"], 0] + UNIT_COST_IN_WIDTHS, block_count)
    count = len(unit["pair"])
    block = np.searchsorted(starts, np.arange(count), side="right") - 1
    ends_tile = np.diff(unit["tile"], append=-1) != 0
    first_block = block[np.searchsorted(unit["tile"], unit["tile"], side="left")]
    last_block = block[np.searchsorted(unit["tile"], unit["tile"], side="right") - 1]
    fields = [
        *(unit["low"], unit["high"], unit["grid"], unit["pair"]),
        pairs[unit["pair"], 0] | (ends_tile | (np.diff(block, append=-1) != 0)) << 16,
        unit["live_rows"] | (last_block - first_block + 1) << 16,
        *(unit["output"], first_block),
        *(pairs[unit["pair"], 1], pairs[unit["pair"], 2]),
        pairs[unit["pair"], 3] | pairs[unit["pair"], 4] << 16,
        pairs[unit["pair"], 0],
    ]
    lengths = np.diff(starts, append=count)
    table = np.zeros((len(starts), 1 + int(lengths.max()), len(fields)), dtype=np.uint32)
    table[block, 1 + np.arange(count) - starts[block]] = np.stack(fields, axis=1)
    table[:, 0, 0] = lengths
    table[:, 0, 1] = _chunks(weight, unit["member"], starts, lengths)
    return Schedule(pairs, table.view(np.int32))


def _pair_row(pair: Pair, columns: list[int]) -> list[int]:
    first = [0 if group is None else group * GROUP_SIZE for group in pair.groups]
    live = [0 if group is None else columns[group] for group in pair.groups]
    return [pair.width, *first, *live]


def _units(weight: RuntimeWeight, rows: int) -> dict[str, np.ndarray]:
    """Fields of every unit: tile by tile, in each the pairs in order. Offsets in 16 bytes."""
    parts: dict[str, list[np.ndarray]] = {}
    first_pair = first_tile = 0
    for index, member in enumerate(weight.members):
        count = len(member.pairs)
        tiles = member.rows // rows
        row = np.repeat(np.arange(tiles, dtype=np.int64) * rows, count)
        low, high, grid, low_bits, high_bits = np.tile(
            np.array([_offsets(pair) for pair in member.pairs], dtype=np.int64).T, tiles
        )
        found = {
            "low": low + row * 2 * low_bits,
            "high": high + row * 2 * high_bits,
            "grid": grid + row // 2,
            "pair": first_pair + np.tile(np.arange(count), tiles),
            "tile": first_tile + np.repeat(np.arange(tiles), count),
            "member": np.full(count * tiles, index),
            "output": member.first_output + row,
            "live_rows": np.clip(member.N - row, 0, rows),
        }
        for name, values in found.items():
            parts.setdefault(name, []).append(values)
        first_pair += count
        first_tile += tiles
    return {name: np.concatenate(values) for name, values in parts.items()}


def _offsets(pair: Pair) -> tuple[int, int, int, int, int]:
    low_bits, *high_bits = PLANES[pair.width]
    return pair.low // 16, pair.high // 16, pair.grid // 16, low_bits, sum(high_bits)


def _chunks(
    weight: RuntimeWeight, member: np.ndarray, starts: np.ndarray, lengths: np.ndarray
) -> np.ndarray:
    """Pairs whose activations each block needs: once each where it stays in one member."""
    pairs = np.array([len(found.pairs) for found in weight.members])
    first, last = member[starts], member[starts + lengths - 1]
    return np.where(first == last, np.minimum(lengths, pairs[first]), lengths)


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
        self.block_count = len(schedule.units)
        self._capacity = schedule.capacity
        self._pairs = torch.from_numpy(schedule.pairs).to(device)
        self._units = torch.from_numpy(schedule.units).to(device)
        counters = self.block_count * shape.warps
        self._counters = torch.zeros(counters, dtype=torch.int32, device=device)
        cells = shape.rows * 8 * -(-tokens // 8)
        self._partial = workspace("decode partial", self.block_count * 2 * cells * 4, device)
        shared = properties.shared_memory_per_multiprocessor
        self._chunks = schedule.chunks if tokens <= FUSED_TOKENS else 0
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
        arguments.pairs, arguments.units = self._pairs.data_ptr(), self._units.data_ptr()
        arguments.partial, arguments.counters = self._partial.data_ptr(), self._counters.data_ptr()
        arguments.inputs = None if self._inputs is None else self._inputs.data_ptr()
        arguments.pair_count = self._pairs.shape[0]
        arguments.chunk_capacity = self._chunks
        arguments.unit_capacity = self._capacity
        arguments.stage_count = self._plan.stages
        arguments.stage_bytes = self._plan.stage_bytes


def _input_bytes(tokens: int) -> int:
    """Bytes of one pair's activations: 8 vectors of 64 bytes a token, then (scale, sum) twice."""
    return 528 * tokens
