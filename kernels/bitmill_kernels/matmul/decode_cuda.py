"""Launching of the CUDA decode kernel (`decode_cuda.cu`), by the tables of `units.py`."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitmill_kernels.hopper.schedule import (
    MAX_SHARED_BYTES,
    RESERVED_SHARED_BYTES,
    SHARED_KEPT_FREE,
    Arguments,
    BlockShape,
)
from bitmill_kernels.matmul.cuda_library import load_library
from bitmill_kernels.matmul.runtime import RuntimeWeight
from bitmill_kernels.matmul.units import build_schedule, divides_rows
from bitmill_kernels.workspace import workspace

TOKEN_BUCKETS = (2, 8, 16, 32)
"""A launch shape is chosen for the smallest bucket that holds the tokens."""

FUSED_CHUNKS = {2: (15, 60), 3: (7, 12)}
"""By most tokens, of up to how many pairs a block, and all blocks of a multiprocessor together,
convert the activations for themselves. More are converted by the prologue kernel. Measured on an
H100 (two tokens) and an H200 (three)."""

MAX_FUSED_TOKENS = 8
"""Launch shapes for more tokens have no code to convert."""

MAX_STAGES = 8
UNIT_COST_IN_WIDTHS = 1.0
"""What a unit costs beside its bytes."""


@dataclass(frozen=True)
class DecodeShape(BlockShape):
    """fused: of up to so many tokens blocks convert activations for themselves, where
    `FUSED_CHUNKS` lets them."""

    fused: int = MAX_FUSED_TOKENS


_NARROW = (DecodeShape(8, 2, 1), DecodeShape(4, 2, 3), DecodeShape(4, 1, 4))
SHAPES = {2: _NARROW, 8: _NARROW, 16: _NARROW, 32: (DecodeShape(4, 2, 2), DecodeShape(8, 2, 1))}
"""The shapes that are compiled, by token bucket, as listed at the end of `decode_cuda.cu`; the
first was the fastest over all cases measured on an H100."""


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


class CudaDecoder:
    """y [T, N] = x W^T for 1 to 32 tokens with the compiled kernel; raises where it cannot load."""

    def __init__(
        self,
        weight: RuntimeWeight,
        shapes: Mapping[int, DecodeShape],
        *,
        fused: Mapping[int, tuple[int, int]] = FUSED_CHUNKS,
    ) -> None:
        """shapes: by token bucket, ascending; all tables and workspaces are built here.

        fused: by most tokens, at most `MAX_FUSED_TOKENS`, as `FUSED_CHUNKS`. Raises ValueError for
        a shape that cannot run the weight.
        """
        self._library = load_library()
        self._weight = weight
        self._planes = weight.planes.data_ptr()
        self._grid = weight.grid.data_ptr()
        self._order = None if weight.order is None else weight.order.data_ptr()
        self._launches = {
            tokens: _Launch(weight, shapes[tokens], tokens, fused) for tokens in shapes
        }
        self.max_tokens = max(shapes)

    def converts(self, tokens: int) -> bool:
        """Whether blocks convert the activations of so many tokens for themselves."""
        return tokens <= self._launch(tokens).fused_tokens

    def _launch(self, tokens: int) -> _Launch:
        return next(found for bucket, found in self._launches.items() if bucket >= tokens)

    def __call__(self, x: Tensor, bias: Tensor | None, y: Tensor, *, overlap: bool = True) -> None:
        """x f16 or bf16 [T, K] with contiguous rows, y of its dtype [T, N] contiguous.

        overlap: let the launch begin while the one before it on the stream drains.
        """
        tokens = x.shape[0]
        launch = self._launch(tokens)
        arguments = Arguments(
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
        plan = launch.fill(arguments)
        status = self._library.bitmill_decode(
            ctypes.byref(arguments),
            launch.shape.warps,
            launch.shape.row_tiles,
            launch.shape.blocks,
            launch.block_count,
            plan.total_bytes,
            int(overlap),
            torch.cuda.current_stream(x.device).cuda_stream,
        )
        if status != 0:
            raise RuntimeError(
                f"the CUDA decode kernel failed to launch with {launch.shape}: cudaError {status}"
            )


class _Launch:
    """Tables, workspace and shared memory of one block shape and token bucket.

    Blocks convert up to `fused_tokens` for themselves.
    """

    def __init__(
        self,
        weight: RuntimeWeight,
        shape: DecodeShape,
        tokens: int,
        fused: Mapping[int, tuple[int, int]],
    ) -> None:
        device = weight.planes.device
        properties = torch.cuda.get_device_properties(device)
        self.shape = shape
        schedule = build_schedule(
            weight,
            shape.rows,
            properties.multi_processor_count * shape.blocks,
            UNIT_COST_IN_WIDTHS,
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
        self._chunks = schedule.chunks
        allowed = fused_tokens(fused, tokens, self._chunks, shape.blocks)
        self.fused_tokens = min(shape.fused, allowed)
        self._fused: SharedPlan | None = None
        if self.fused_tokens:
            self._fused = plan_shared(weight, shape, self.fused_tokens, self._chunks, shared)
        if self._fused is None:
            self.fused_tokens = 0
        staged = plan_shared(weight, shape, tokens, 0, shared)
        if staged is None or not divides_rows(weight, shape.rows):
            raise ValueError(
                f"{shape} cannot run {tokens} tokens of N={weight.N}, K={weight.K}: two stages do "
                "not fit shared memory, or its tiles do not divide the padded rows"
            )
        self._staged = staged
        self._inputs: Tensor | None = None
        if self.fused_tokens < tokens:
            size = weight.pair_count * _input_bytes(tokens)
            self._inputs = workspace("decode inputs", size, device)

    def fill(self, arguments: Arguments) -> SharedPlan:
        """Set what the launch knows, for `arguments.tokens`; its use of shared memory."""
        own = self._fused if arguments.tokens <= self.fused_tokens else None
        plan = own or self._staged
        arguments.pairs, arguments.units = self._pairs.data_ptr(), self._units.data_ptr()
        arguments.partial, arguments.counters = self._partial.data_ptr(), self._counters.data_ptr()
        arguments.inputs = None if own or self._inputs is None else self._inputs.data_ptr()
        arguments.pair_count = self._pairs.shape[0]
        arguments.chunk_capacity = self._chunks if own else 0
        arguments.unit_capacity = self._capacity
        arguments.stage_count = plan.stages
        arguments.stage_bytes = plan.stage_bytes
        return plan


def fused_tokens(
    fused: Mapping[int, tuple[int, int]], bucket: int, chunks: int, blocks: int
) -> int:
    """Up to so many tokens of a bucket blocks that need `chunks` pairs convert for themselves.

    fused: as `FUSED_CHUNKS`; blocks: on each multiprocessor.
    """
    if bucket > MAX_FUSED_TOKENS:
        return 0
    fits = (
        tokens
        for tokens, (most, together) in fused.items()
        if tokens <= bucket and chunks <= most and chunks * blocks <= together
    )
    return max(fits, default=0)


def _input_bytes(tokens: int) -> int:
    """Bytes of one pair's activations: 8 vectors of 64 bytes a token, then (scale, sum) twice."""
    return 528 * tokens
