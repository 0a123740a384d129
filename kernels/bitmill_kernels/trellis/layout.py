"""Stored tensors of a linear in trellis codes, and constants of the code. Torch-free.

A linear is cut into tiles of 16 rows and 16 columns, each a circle of 32 k bytes at rate k
(`code.py`). Groups of 128 columns have 8 columns of tiles; a shorter last group, and a last row of
tiles, are filled up: what stands there is decoded and dropped.

    codes_r{k}   u8 [G_k, ceil(N / 16), 8, 32 k]           full groups of rate k, in column order
    codes_tail   u8 [ceil(N / 16), ceil(c / 16), 32 k]     the last group of c < 128 columns
"""

from __future__ import annotations

from collections.abc import Sequence

from bitmill_kernels.layout import GROUP_SIZE, group_columns

MULTIPLIER = 0x962CAE47
KEPT, FLIPPED = 0x8FFF, 0x3B60
STATE_BITS = 16
RATES = (1, 2, 3, 4, 5, 6, 7, 8)
TILE = 16
"""Rows, and columns, of a tile."""
TILES = GROUP_SIZE // TILE
"""Tiles along the columns of a full group."""
LARGEST = 16.0
"""Targets beyond it, plus or minus, are searched for as if they were there: values end below 4."""
SEAM = {1: 40, 2: 24, 3: 16, 4: 12, 5: 16, 6: 12, 7: 12, 8: 12}
"""Steps on each side of the seam that are looked at to choose its bits, by rate."""


def tile_bytes(rate: int) -> int:
    """Bytes of a tile."""
    return TILE * TILE * rate // 8


def tile_count(size: int) -> int:
    """Tiles along `size` rows or columns."""
    return -(-size // TILE)


def circle_shapes(N: int, K: int, rates: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Shape of every u8 tensor of circles. Raises ValueError unless there is a rate per group."""
    columns = group_columns(K)
    if len(rates) != len(columns):
        raise ValueError(f"{len(rates)} rates for {len(columns)} groups of {K} columns")
    illegal = sorted(set(rates) - set(RATES))
    if illegal:
        raise ValueError(f"rates {illegal} are none of {list(RATES)}")
    full = [rate for rate, count in zip(rates, columns, strict=True) if count == GROUP_SIZE]
    shapes: dict[str, tuple[int, ...]] = {
        f"codes_r{rate}": (full.count(rate), tile_count(N), TILES, tile_bytes(rate))
        for rate in sorted(set(full))
    }
    if columns[-1] < GROUP_SIZE:
        shapes["codes_tail"] = (tile_count(N), tile_count(columns[-1]), tile_bytes(rates[-1]))
    return shapes
