"""Products of many tokens with a linear in trellis codes on Hopper (`batch_cuda.cu`)."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from bitmill_kernels.hopper.building import HOPPER
from bitmill_kernels.hopper.launch import Launch, launches_for
from bitmill_kernels.hopper.schedule import (
    Rings,
    WarpgroupShape,
    plan_rings,
    tokens_of,
    unit_table,
    whole_tiles,
)
from bitmill_kernels.trellis.building import built_for_hopper
from bitmill_kernels.trellis.layout import TILE, TILES, tile_bytes
from bitmill_kernels.trellis.product import full_circles, stored_groups

_WIDE, _NARROW = WarpgroupShape(4), WarpgroupShape(2)
SHAPES = {
    32: (_WIDE, _NARROW),
    64: (_WIDE, _NARROW),
    128: (_NARROW,),
    256: (_NARROW,),
}
"""The shapes that are compiled, by tokens of a launch, as listed at the end of `batch_cuda.cu`."""

WIDE_FROM = 1 << 25
"""Weights from which blocks of more rows pay, as decoding takes more than sums."""

MOST_TOKENS = ((1 << 27, 1024), (1 << 24, 256), (0, 128))
"""Weights from which this is faster than decoded rows, up to so many tokens (on an H200)."""


def most_tokens(weights: int) -> int:
    """Up to so many tokens this is faster than decoded weights, for so many weights."""
    return tokens_of(MOST_TOKENS, weights)


def available(device: torch.device) -> bool:
    """Whether this device has `wgmma` and the kernel is there or can be compiled."""
    return torch.cuda.get_device_capability(device) == HOPPER and load_library() is not None


def plan(rates: Sequence[int], shape: WarpgroupShape, tokens: int) -> Rings | None:
    """How a block uses shared memory for so many tokens a launch, or None where it does not fit."""
    return plan_rings(shape.rows // TILE * TILES * tile_bytes(max(rates)), tokens, 1)


def fitting_shapes(rates: Sequence[int], weights: int) -> dict[int, WarpgroupShape]:
    """For each number of tokens of a launch the fastest shape that fits."""
    return {
        tokens: shape
        for tokens, shapes in SHAPES.items()
        for shape in (reversed(shapes) if weights >= WIDE_FROM else shapes)
        if plan(rates, shape, tokens) is not None
    }


class CudaTrellisBatch:
    """y [T, N] = x W^T for any number of tokens of half precision.

    circles: as `circle_shapes` names them, on the device; row_scales f32 [N], group_scales f32 [G];
    order: i32 [K] or None. shapes: by tokens of a launch, ascending.
    """

    def __init__(
        self,
        circles: Mapping[str, Tensor],
        row_scales: Tensor,
        group_scales: Tensor,
        K: int,
        rates: Sequence[int],
        order: Tensor | None,
        shapes: Mapping[int, WarpgroupShape],
    ) -> None:
        """Build all tables. Raises ValueError for a shape that cannot run the linear."""
        library = load_library()
        if library is None:
            raise RuntimeError("the batch kernel of trellis codes cannot be built: see the log")
        self._library = library
        self.N, self.K, self._rates = len(row_scales), K, tuple(rates)
        self._rows, self._groups, self._order = row_scales, group_scales, order
        self._largest = float(group_scales.abs().max())
        device = row_scales.device
        stored = [full_circles(one) for _, _, one in stored_groups(circles, rates, K)]
        self._circles = stored  # their addresses are in the tables
        addresses = [one.data_ptr() for one in stored]
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._launches = {}
        for tokens, shape in shapes.items():
            rings = plan(rates, shape, tokens)
            if rings is None:
                raise ValueError(f"{shape} cannot run {tokens} tokens: no place in shared memory")
            blocks = whole_tiles(-(-self.N // shape.rows), processors)
            table = schedule(addresses, self.N, rates, shape.rows, blocks)
            self._launches[tokens] = Launch(table, shape, rings, tokens, device)

    def __call__(self, x: Tensor, *, overlap: bool = True) -> Tensor:
        """y [T, N] of x [T, K] in the source's columns, f16 or bf16, with contiguous rows.

        overlap: let the launch begin while the one before it on the stream drains.
        """
        y = torch.empty(len(x), self.N, dtype=x.dtype, device=x.device)
        for rows, launch in launches_for(self._launches, len(x)):
            launch(
                self._library.bitmill_trellis_batch,
                x[rows],
                y[rows],
                self.K,
                self._groups.data_ptr(),
                self._largest,
                groups=len(self._rates),
                scaled=True,
                overlap=overlap,
                order=None if self._order is None else self._order.data_ptr(),
                row_scales=self._rows.data_ptr(),
                pair_count=len(self._rates),
            )
        return y


def schedule(
    addresses: Sequence[int],
    N: int,
    rates: Sequence[int],
    rows: int,
    block_count: int,
) -> np.ndarray:
    """The table of units, (tile of `rows` rows, group), as `unit_table` gives it.

    addresses: of each group's circles [ceil(N / 16), 8, 32 rate].
    """
    groups, tiles = len(rates), -(-N // rows)
    row = np.repeat(np.arange(tiles, dtype=np.int64) * rows, groups)
    rate = np.tile(np.array(rates, dtype=np.int64), tiles)
    address = np.tile(np.array(addresses, dtype=np.int64), tiles)
    address = (address + row // TILE * TILES * TILE * TILE * rate // 8) // 16
    nothing = np.zeros_like(row)
    unit = {
        "low": address & 0xFFFFFFFF,
        "high": address >> 32,
        "grid": nothing,
        "pair": np.tile(np.arange(groups), tiles),
        "width": rate,
        "live_rows": np.minimum(rows, N - row),
        "output": row,
        "tile": row // rows,
        "first": np.stack((nothing, nothing)),
        "live": np.stack((nothing, nothing)),
    }
    return unit_table(unit, np.ones(len(rate)), block_count)  # decoding hardly depends on the rate


@cache
def load_library() -> ctypes.CDLL | None:
    """The compiled kernel, or None where it cannot be built."""
    library = built_for_hopper("batch")
    if library is not None:
        pointer, integer = ctypes.c_void_p, ctypes.c_int
        library.bitmill_trellis_batch.argtypes = [
            *(pointer, integer, pointer, ctypes.c_float),
            *([integer] * 5),
            pointer,
        ]
    return library
