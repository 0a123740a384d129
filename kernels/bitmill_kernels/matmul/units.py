"""Units of the CUDA kernels that multiply planes: a tile of rows of one pair of groups each.

Units of the decode kernel cost their bytes plus a constant for the work that does not depend on
their width. Those of `wgmma` all cost the same: products take longer than decoding, at any width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitmill_kernels.hopper.schedule import unit_table
from bitmill_kernels.layout import GROUP_SIZE, PLANES, group_columns
from bitmill_kernels.matmul.runtime import Pair, RuntimeWeight


def divides_rows(weight: RuntimeWeight, rows: int) -> bool:
    """Whether tiles of so many rows end where the members' padded rows end, as they must."""
    return all(member.rows % rows == 0 for member in weight.members)


@dataclass(frozen=True)
class Schedule:
    """Host tables i32 of one launch shape, as `units.h` reads them.

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


def build_schedule(
    weight: RuntimeWeight, rows: int, block_count: int, unit_cost: float | None
) -> Schedule:
    """Share the units of all members out among `block_count` blocks, fewer if units are fewer.

    unit_cost: what a unit costs beside its bytes, in bits of width; None where all cost the same.
    """
    columns = group_columns(weight.K)
    pairs = np.array(
        [_pair_row(pair, columns) for member in weight.members for pair in member.pairs],
        dtype=np.int32,
    )
    unit = _units(weight, rows)
    own = pairs[unit["pair"]].T
    unit |= {"width": own[0], "first": own[1:3], "live": own[3:5]}
    cost = np.ones(len(own[0])) if unit_cost is None else own[0] + unit_cost
    table = unit_table(unit, cost, block_count)
    lengths = table[:, 0, 0]
    starts = np.cumsum(lengths) - lengths
    table[:, 0, 1] = _chunks(weight, unit["member"], starts, lengths)
    return Schedule(pairs, table)


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
