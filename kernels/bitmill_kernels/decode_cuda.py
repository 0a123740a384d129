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
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bitmill_kernels.runtime import RuntimeWeight
from bitmill_kernels.workspace import workspace

MAX_TOKENS = 16
SMALLEST_CAPABILITY = (9, 0)
RESERVED_SHARED_BYTES = 1024
MAX_SHARED_BYTES = 227 * 1024
UNIT_COST_IN_WIDTHS = 1.0
MAX_STAGES = 8

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockShape:
    """warps x row_tiles x 16 rows a tile, `blocks` resident on each multiprocessor.

    Only the shapes listed at the end of `decode_cuda.cu` are compiled.
    """

    warps: int
    row_tiles: int
    blocks: int

    @property
    def rows(self) -> int:
        return self.warps * self.row_tiles * 16


SHAPES = (
    BlockShape(8, 1, 2),
    BlockShape(4, 2, 3),
    BlockShape(4, 2, 4),
    BlockShape(4, 1, 4),
    BlockShape(8, 2, 1),
    BlockShape(8, 2, 2),
)


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
                "inputs",
                "factor",
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
                "output_stride",
                "stage_count",
                "stage_bytes",
                "is_bf16",
            )
        ),
    )


@dataclass(frozen=True)
class Schedule:
    """Host tables i32 of one launch shape: pairs [P, 4], tiles [tiles, 8], blocks [blocks, 4]."""

    pairs: np.ndarray
    tiles: np.ndarray
    blocks: np.ndarray


def build_schedule(weight: RuntimeWeight, rows: int, block_count: int) -> Schedule:
    """Share the units of all members out among `block_count` blocks, fewer if units are fewer."""
    pairs = [
        (pair.width, pair.low // 16, pair.high // 16, pair.grid // 16)
        for member in weight.members
        for pair in member.pairs
    ]
    tiles: list[list[int]] = []
    costs: list[np.ndarray] = []
    first_pair = first_unit = 0
    for member in weight.members:
        cost = np.array([pair.width + UNIT_COST_IN_WIDTHS for pair in member.pairs])
        for row in range(0, member.rows, rows):
            live = max(0, min(rows, member.N - row))
            place = [first_pair, len(cost), row, first_unit, member.first_output + row, live]
            tiles.append([*place, 0, 0])
            costs.append(cost)
            first_unit += len(cost)
        first_pair += len(member.pairs)
    starts = _equal_runs(np.concatenate(costs), block_count)
    table = np.array(tiles, dtype=np.int32)
    ends = np.append(starts[1:], first_unit)
    last_unit = table[:, 3] + table[:, 1] - 1
    table[:, 6] = np.searchsorted(starts, table[:, 3], side="right") - 1
    table[:, 7] = np.searchsorted(starts, last_unit, side="right") - table[:, 6]
    first_tile = np.searchsorted(table[:, 3], starts, side="right") - 1
    blocks = np.stack([starts, ends, first_tile, np.zeros_like(starts)], axis=1)
    return Schedule(np.array(pairs, dtype=np.int32), table, blocks.astype(np.int32))


def _equal_runs(cost: np.ndarray, count: int) -> np.ndarray:
    """First unit of each of `count` non-empty consecutive runs of about equal cost."""
    count = min(count, len(cost))
    before = np.concatenate([[0.0], np.cumsum(cost)])
    starts = np.searchsorted(before, before[-1] * np.arange(count) / count - 1e-9)
    index = np.arange(count)
    distinct: np.ndarray = np.maximum.accumulate(starts - index) + index
    return np.asarray(np.minimum(distinct, len(cost) - count + index))


class CudaDecoder:
    """y [T, N] = x W^T for 1 to 16 tokens with the compiled kernel; raises where it cannot load."""

    max_tokens = MAX_TOKENS

    def __init__(self, weight: RuntimeWeight, shapes: tuple[BlockShape, BlockShape]) -> None:
        """shapes: for 1 to 8 and for 9 to 16 tokens; all tables and workspaces are built here."""
        self._library = load_library()
        self._weight = weight
        device = weight.planes.device
        self._launches = [_Launch(weight, shape, 8 * (i + 1)) for i, shape in enumerate(shapes)]
        self._inputs = workspace("decode inputs", weight.pair_count * _input_bytes(16), device)
        self._factor = workspace("decode factor", 4 * MAX_TOKENS, device)

    def __call__(self, x: Tensor, bias: Tensor | None, y: Tensor, *, overlap: bool = True) -> None:
        """x f16 or bf16 [T, K] with contiguous rows, y of its dtype [T, N] contiguous."""
        tokens = x.shape[0]
        stream = torch.cuda.current_stream(x.device).cuda_stream
        is_bf16 = int(x.dtype == torch.bfloat16)
        order = self._weight.order
        status = self._library.bitmill_prologue(
            x.data_ptr(),
            None if order is None else order.data_ptr(),
            self._weight.slots.data_ptr(),
            self._inputs.data_ptr(),
            self._factor.data_ptr(),
            self._weight.K,
            self._weight.slots.shape[0],
            x.stride(0),
            tokens,
            is_bf16,
            stream,
        )
        _check(status, "prologue")
        launch = self._launches[(tokens - 1) // 8]
        arguments = _Arguments(
            planes=self._weight.planes.data_ptr(),
            grid=self._weight.grid.data_ptr(),
            inputs=self._inputs.data_ptr(),
            factor=self._factor.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            y=y.data_ptr(),
            tokens=tokens,
            output_stride=y.stride(0),
            is_bf16=is_bf16,
        )
        launch.fill(arguments)
        shape = launch.shape
        status = self._library.bitmill_decode(
            ctypes.byref(arguments),
            shape.warps,
            shape.row_tiles,
            shape.blocks,
            launch.block_count,
            launch.shared_bytes,
            int(overlap),
            stream,
        )
        _check(status, f"decode with {shape}")


class _Launch:
    """Tables, workspace and shared memory of one block shape and token count."""

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
        self._counters = torch.zeros(
            len(schedule.tiles) * shape.warps, dtype=torch.int32, device=device
        )
        cells = shape.rows // 16 * (tokens // 8) * 128
        self._partial = workspace("decode partial", self.block_count * 2 * cells * 4, device)
        widest = max(pair.width for member in weight.members for pair in member.pairs)
        self._stage_bytes = -(-(_input_bytes(tokens) + shape.rows * (8 + 32 * widest)) // 128) * 128
        available = properties.shared_memory_per_multiprocessor // shape.blocks
        available = min(available - RESERVED_SHARED_BYTES, MAX_SHARED_BYTES)
        fixed = 16 * MAX_STAGES + 16 * weight.pair_count + 128
        self._stages = min(MAX_STAGES, (available - fixed) // self._stage_bytes)
        if self._stages < 2:
            raise ValueError(
                f"{shape} needs two stages of {self._stage_bytes} bytes and has {available}: "
                "choose a shape with fewer rows or blocks"
            )
        self.shared_bytes = fixed + self._stages * self._stage_bytes

    def fill(self, arguments: _Arguments) -> None:
        pairs, tiles, blocks = self._tables
        arguments.pairs, arguments.tiles = pairs.data_ptr(), tiles.data_ptr()
        arguments.blocks, arguments.partial = blocks.data_ptr(), self._partial.data_ptr()
        arguments.counters = self._counters.data_ptr()
        arguments.pair_count = pairs.shape[0]
        arguments.stage_count, arguments.stage_bytes = self._stages, self._stage_bytes


def _input_bytes(tokens: int) -> int:
    """Bytes of one pair's activations: vectors, then sums padded to 16 bytes."""
    return 512 * tokens + -(-8 * tokens // 16) * 16


def _check(status: int, what: str) -> None:
    if status != 0:
        raise RuntimeError(f"the CUDA {what} kernel failed to launch: cudaError {status}")


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
    library.bitmill_prologue.argtypes = [pointer] * 5 + [integer] * 5 + [pointer]
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
