"""Products of few tokens with linears in trellis codes on Hopper (`decode_cuda.cu`)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from bitmill_kernels.hopper.building import HOPPER
from bitmill_kernels.hopper.launch import stream_of
from bitmill_kernels.hopper.schedule import (
    BARRIER_BYTES,
    MAX_SHARED_BYTES,
    RESERVED_SHARED_BYTES,
    SHARED_KEPT_FREE,
    Arguments,
    BlockShape,
    whole_tiles,
)
from bitmill_kernels.trellis.building import built_for_hopper
from bitmill_kernels.trellis.layout import TILE, TILES, tile_bytes
from bitmill_kernels.trellis.product import Member, full_circles, member_table, stored_groups
from bitmill_kernels.workspace import NOTHING, workspace

MAX_STAGES = 16
LAUNCHES = (8, 16)
"""A kernel is compiled for up to so many tokens."""

MOST_MEMBERS = 32
"""Linears of a launch: a lane of a warp knows the scale of a group of each."""

SHAPES = (BlockShape(8, 2, 2), BlockShape(4, 1, 4))
"""The shapes that are compiled, as listed at the end of `decode_cuda.cu`."""

LARGE_FROM = 1 << 27
"""Weights from which the first shape is faster than the second. Measured on an H200."""


def available(device: torch.device) -> bool:
    """Whether this device is a Hopper and the kernel is there or can be compiled."""
    return torch.cuda.get_device_capability(device) == HOPPER and load_library() is not None


def shape_for(weights: int) -> BlockShape:
    """The fastest shape for so many weights."""
    large, small = SHAPES
    return large if weights >= LARGE_FROM else small


def input_bytes(tokens: int, members: int) -> int:
    """Of a group's arranged activations: 256 a token, then the tokens' factors of each linear."""
    return 256 * tokens + members * -(-tokens // 4) * 16


@dataclass(frozen=True)
class Stages:
    """The ring of a block in shared memory."""

    count: int
    bytes: int

    @property
    def shared_bytes(self) -> int:
        """Of a block."""
        return BARRIER_BYTES + self.count * self.bytes


def plan(most: int, shape: BlockShape, tokens: int, members: int) -> Stages:
    """How a block uses shared memory for up to so many tokens, so many linears and this rate."""
    size = shape.rows // TILE * TILES * tile_bytes(most) + input_bytes(tokens, members)
    processor = MAX_SHARED_BYTES + RESERVED_SHARED_BYTES - SHARED_KEPT_FREE
    free = processor // shape.blocks - RESERVED_SHARED_BYTES - BARRIER_BYTES
    return Stages(min(MAX_STAGES, free // size), size)


class CudaTrellisDecode:
    """y [T, N] = x W^T for up to 16 tokens of half precision, outputs of linears side by side.

    members: linears of as many columns, on the device; order: i32 [K] or None.
    """

    def __init__(self, members: Sequence[Member], order: Tensor | None, shape: BlockShape) -> None:
        """Build the tables and take the workspace. Raises ValueError for too many linears."""
        library = load_library()
        if library is None:
            raise RuntimeError("the decode kernel of trellis codes cannot be built: see the log")
        if len(members) > MOST_MEMBERS:
            raise ValueError(f"{len(members)} linears share an input: at most {MOST_MEMBERS} do")
        self._library, self._shape, self._order = library, shape, order
        outputs = [member.N for member in members]
        self.N, self.K = sum(outputs), members[0].K
        self._count, self._groups = len(members), len(members[0].rates)
        self._rows = torch.cat([member.row_scales for member in members])
        self._scales = torch.cat([member.group_scales for member in members])
        self._circles, tables = [], []
        for member in members:
            stored = stored_groups(member.circles, member.rates, self.K)
            circles = [full_circles(one) for _, _, one in stored]
            tables.append(group_table([one.data_ptr() for one in circles], member.rates))
            self._circles += circles  # their addresses are in the tables
        device = self._rows.device
        self._table = torch.from_numpy(np.concatenate(tables)).to(device)
        self._stack = member_table(outputs, shape.rows).to(device)
        self._tiles = sum(-(-N // shape.rows) for N in outputs)
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        blocks = whole_tiles(self._tiles, processors * shape.blocks)
        self._blocks = min(blocks, self._tiles * self._groups)
        sums = 4 * shape.rows * max(LAUNCHES)
        self._partial = workspace("batch partial", self._blocks * 2 * sums, device, fill=NOTHING)
        most = max(max(member.rates) for member in members)
        self._stages = {tokens: plan(most, shape, tokens, self._count) for tokens in LAUNCHES}

    def __call__(self, x: Tensor, *, overlap: bool = True) -> Tensor:
        """y [T, N] of x [T, K] in the source's columns, f16 or bf16, with contiguous rows.

        overlap: let the launch begin while the one before it on the stream drains.
        """
        y = torch.empty(len(x), self.N, dtype=x.dtype, device=x.device)
        tokens = next(most for most in LAUNCHES if most >= len(x))
        stages = self._stages[tokens]
        size = self._groups * input_bytes(len(x), self._count)
        inputs = workspace("batch inputs", size, x.device)
        arguments = Arguments(
            x=x.data_ptr(),
            order=None if self._order is None else self._order.data_ptr(),
            inputs=inputs.data_ptr(),
            row_scales=self._rows.data_ptr(),
            partial=self._partial.data_ptr(),
            y=y.data_ptr(),
            pair_count=self._groups,
            tokens=len(x),
            x_stride=x.stride(0),
            output_stride=y.stride(0),
            stage_count=stages.count,
            stage_bytes=stages.bytes,
            is_bf16=int(x.dtype == torch.bfloat16),
        )
        status = self._library.bitmill_trellis_decode(
            ctypes.byref(arguments),
            self.K,
            self._scales.data_ptr(),
            self._table.data_ptr(),
            self._stack.data_ptr(),
            self._count,
            self._tiles,
            self._shape.warps,
            self._shape.row_tiles,
            self._shape.blocks,
            tokens,
            self._blocks,
            stages.shared_bytes,
            int(overlap),
            stream_of(x.device),
        )
        if status != 0:
            raise RuntimeError(
                f"the decode kernel of trellis codes failed to launch with {self._shape} and "
                f"{len(x)} tokens: cudaError {status}"
            )
        return y


def group_table(addresses: Sequence[int], rates: Sequence[int]) -> np.ndarray:
    """`Group` of decode_cuda.cu of each group, i32 [G, 8], one rate after another.

    addresses: of each group's circles [ceil(N / 16), 8, 32 rate].
    """
    order = np.argsort(rates, kind="stable")
    rate = np.array(rates)[order]
    table = np.zeros((len(rates), 8), dtype=np.int32)
    table[:, :2] = np.array(addresses, dtype=np.int64)[order, None].view(np.int32)
    table[:, 2] = rate
    table[:, 3] = np.searchsorted(rate, rate, side="right") - np.arange(len(rate))
    table[:, 4] = order
    return table


@cache
def load_library() -> ctypes.CDLL | None:
    """The compiled kernel, or None where it cannot be built."""
    library = built_for_hopper("decode")
    if library is not None:
        pointer, integer = ctypes.c_void_p, ctypes.c_int
        library.bitmill_trellis_decode.argtypes = [
            *(pointer, integer, pointer, pointer, pointer),
            *([integer] * 9),
            pointer,
        ]
    return library
