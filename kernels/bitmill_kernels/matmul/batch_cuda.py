"""Launching of the CUDA kernel for many tokens (`batch_cuda.cu`), by the tables of `units.py`.

Weights are rounded once to half precision before they are multiplied, as a dequantized weight is;
the decode kernels round nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from bitmill_kernels.hopper.schedule import (
    Arguments,
    Rings,
    WarpgroupShape,
    group_bytes,
    plan_rings,
    whole_tiles,
)
from bitmill_kernels.matmul.cuda_library import load_library
from bitmill_kernels.matmul.runtime import RuntimeWeight
from bitmill_kernels.matmul.units import build_schedule, divides_rows
from bitmill_kernels.workspace import workspace

TOKENS_A_WIDTH = 20
"""A unit costs as much for so many tokens as for one bit of width."""


SHAPES = {
    32: (WarpgroupShape(4, 1), WarpgroupShape(2, 1)),
    64: (WarpgroupShape(4, 1), WarpgroupShape(2, 2), WarpgroupShape(2, 1)),
    128: (WarpgroupShape(2, 2), WarpgroupShape(2, 1)),
}
"""The shapes that are compiled, by tokens of a launch, as listed at the end of `batch_cuda.cu`."""


def plan(weight: RuntimeWeight, shape: WarpgroupShape, tokens: int) -> Rings | None:
    """How a block uses shared memory, or None where it does not fit or tiles do not end with rows.

    tokens: those of a launch, one of `SHAPES`.
    """
    if not divides_rows(weight, shape.rows):
        return None
    widest = max(pair.width for member in weight.members for pair in member.pairs)
    return plan_rings(shape.rows * (8 + 32 * widest), tokens, 2)


class CudaBatch:
    """y [T, N] = x W^T for any number of tokens with the compiled kernel."""

    def __init__(self, weight: RuntimeWeight, shapes: Mapping[int, WarpgroupShape]) -> None:
        """shapes: by tokens of a launch, ascending; all tables are built here.

        Raises ValueError for a shape that cannot run the weight, RuntimeError or OSError where the
        library cannot be loaded.
        """
        self._library = load_library()
        self._weight = weight
        self._launches = {tokens: _Launch(weight, shapes[tokens], tokens) for tokens in shapes}

    def __call__(self, x: Tensor, bias: Tensor | None, y: Tensor, *, overlap: bool = True) -> None:
        """x f16 or bf16 [T, K] with contiguous rows, y of its dtype [T, N] contiguous.

        overlap: let the launch begin while the one before it on the stream drains.
        """
        tokens, weight = x.shape[0], self._weight
        tile = next((tile for tile in self._launches if tile >= tokens), max(self._launches))
        launch = self._launches[tile]
        is_bf16 = x.dtype == torch.bfloat16
        padded = -(-tokens // tile) * tile
        inputs = workspace("batch inputs", weight.pair_count * 2 * group_bytes(padded), x.device)
        factors = workspace("batch factors", 4 * tokens, x.device) if is_bf16 else None
        arguments = Arguments(
            planes=weight.planes.data_ptr(),
            grid=weight.grid.data_ptr(),
            pairs=launch.pairs.data_ptr(),
            units=launch.units.data_ptr(),
            x=x.data_ptr(),
            order=None if weight.order is None else weight.order.data_ptr(),
            inputs=inputs.data_ptr(),
            factors=None if factors is None else factors.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            partial=launch.partial.data_ptr(),
            counters=launch.counters.data_ptr(),
            y=y.data_ptr(),
            pair_count=launch.pairs.shape[0],
            tokens=tokens,
            x_stride=x.stride(0),
            output_stride=y.stride(0),
            unit_capacity=launch.units.shape[1] - 1,
            stage_count=launch.rings.stages,
            stage_bytes=launch.rings.stage_bytes,
            slot_count=launch.rings.slots,
            is_bf16=int(is_bf16),
        )
        status = self._library.bitmill_batch(
            ctypes.byref(arguments),
            weight.K,
            launch.shape.groups,
            launch.shape.row_tiles,
            tile,
            len(launch.units),
            launch.rings.total_bytes,
            int(overlap),
            torch.cuda.current_stream(x.device).cuda_stream,
        )
        if status != 0:
            raise RuntimeError(
                f"the CUDA batch kernel failed to launch with {launch.shape} and {tile} tokens: "
                f"cudaError {status}"
            )


class _Launch:
    """Tables and workspace of one block shape and number of tokens."""

    def __init__(self, weight: RuntimeWeight, shape: WarpgroupShape, tokens: int) -> None:
        rings = plan(weight, shape, tokens)
        if rings is None:
            raise ValueError(
                f"{shape} cannot run {tokens} tokens of N={weight.N}, K={weight.K}: two stages do "
                "not fit shared memory, or its tiles do not divide the padded rows"
            )
        device = weight.planes.device
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        tiles = sum(member.rows for member in weight.members) // shape.rows
        blocks = whole_tiles(tiles, processors)
        schedule = build_schedule(weight, shape.rows, blocks, tokens / TOKENS_A_WIDTH)
        blocks = len(schedule.units)
        self.shape, self.rings = shape, rings
        self.pairs = torch.from_numpy(schedule.pairs).to(device)
        self.units = torch.from_numpy(schedule.units).to(device)
        warps = 4 * shape.groups
        self.counters = torch.zeros(blocks * warps, dtype=torch.int32, device=device)
        self.partial = workspace("batch partial", blocks * 2 * shape.rows * tokens * 4, device)
