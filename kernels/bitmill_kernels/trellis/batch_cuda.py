"""Products of many tokens with linears in trellis codes on Hopper (`batch_cuda.cu`)."""

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
from bitmill_kernels.trellis.product import Member, full_circles, stored_groups

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
    """y [T, N] = x W^T for any number of tokens of half precision, outputs of linears side by side.

    members: linears of as many columns, on the device; order: i32 [K] or None. shapes: by tokens of
    a launch, ascending.
    """

    def __init__(
        self,
        members: Sequence[Member],
        order: Tensor | None,
        shapes: Mapping[int, WarpgroupShape],
    ) -> None:
        """Build all tables. Raises ValueError for a shape that cannot run the linears."""
        library = load_library()
        if library is None:
            raise RuntimeError("the batch kernel of trellis codes cannot be built: see the log")
        self._library, self._order = library, order
        self.N, self.K = sum(member.N for member in members), members[0].K
        self._rows = torch.cat([member.row_scales for member in members])
        self._scales = torch.cat([member.group_scales for member in members])
        self._groups, self._largest = len(self._scales), float(self._scales.abs().max())
        self._circles, linears = [], []
        for member in members:
            stored = stored_groups(member.circles, member.rates, self.K)
            circles = [full_circles(one) for _, _, one in stored]
            linears.append((member.N, member.rates, [one.data_ptr() for one in circles]))
            self._circles += circles  # their addresses are in the tables
        device = self._rows.device
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        rates = [rate for member in members for rate in member.rates]
        self._launches = {}
        for tokens, shape in shapes.items():
            rings = plan(rates, shape, tokens)
            if rings is None:
                raise ValueError(f"{shape} cannot run {tokens} tokens: no place in shared memory")
            tiles = sum(-(-member.N // shape.rows) for member in members)
            table = schedule(linears, shape.rows, whole_tiles(tiles, processors))
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
                self._scales.data_ptr(),
                self._largest,
                groups=self._groups,
                scaled=True,
                overlap=overlap,
                order=None if self._order is None else self._order.data_ptr(),
                row_scales=self._rows.data_ptr(),
                pair_count=self._groups,
            )
        return y


def schedule(
    linears: Sequence[tuple[int, Sequence[int], Sequence[int]]], rows: int, block_count: int
) -> np.ndarray:
    """The table of units, (tile of `rows` rows, group), as `unit_table` gives it.

    linears: of each its rows N, its rates, and the addresses of its groups' circles
    [ceil(N / 16), 8, 32 rate].
    """
    parts = []
    tile = output = group = 0
    for N, rates, addresses in linears:
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
            "pair": group + np.tile(np.arange(groups), tiles),
            "width": rate,
            "live_rows": np.minimum(rows, N - row),
            "output": output + row,
            "tile": tile + row // rows,
            "first": np.stack((nothing, nothing)),
            "live": np.stack((nothing, nothing)),
        }
        parts.append(unit)
        tile, output, group = tile + tiles, output + N, group + groups
    units = {key: np.concatenate([part[key] for part in parts], axis=-1) for key in parts[0]}
    # Decoding hardly depends on the rate.
    return unit_table(units, np.ones(len(units["width"])), block_count)


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
