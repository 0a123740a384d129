"""Weights in half or single precision from the runtime layout, for products of many tokens.

    out[n, k] = scale[n, g] * (code[n, k] - zero[n, g]),  columns in packed order

Above about a hundred tokens the arithmetic, not the memory, sets the time, and no fused kernel
reaches the vendor's matrix product; writing the weight once costs less. Codes become fp16 by
setting the exponent bits of 1024 above them, which is exact, as are both subtractions; the one
rounding is that of the product with the scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitmill_kernels.layout import GROUP_SIZE, group_columns
from bitmill_kernels.matmul.runtime import Member, RuntimeWeight

ROWS = (16, 32, 64, 128)
"""Powers of two that divide the padded rows of any linear."""
WARPS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class DequantizeTile:
    """Launch shape: rows of a tile and warps. Raises ValueError for one that cannot be."""

    rows: int = 64
    warps: int = 4

    def __post_init__(self) -> None:
        if self.rows not in ROWS or self.warps not in WARPS:
            raise ValueError(f"{self}: rows must be one of {ROWS}, warps one of {WARPS}")


RULE = DequantizeTile()
"""What is used where nothing was measured."""


@triton.jit
def _store_field(
    codes: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    out_ptr: tl.tensor,
    column: tl.tensor,
    live: tl.tensor,
    row_mask: tl.tensor,
) -> None:
    biased = (codes | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)
    difference = (biased - 1024.0) - zero[:, None]
    if out_ptr.dtype.element_ty == tl.float16:
        value = difference * scale[:, None]
    else:
        value = difference.to(tl.float32) * scale[:, None].to(tl.float32)
    mask = row_mask[:, None] & (column < live)[None, :]
    tl.store(out_ptr + column[None, :], value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _expand_pair(
    low_ptr: tl.tensor,
    high_ptr: tl.tensor,
    grid_ptr: tl.tensor,
    out_a: tl.tensor,
    out_b: tl.tensor,
    live_a: tl.tensor,
    live_b: tl.tensor,
    row: tl.tensor,
    row_mask: tl.tensor,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
) -> None:
    word_a = tl.load(grid_ptr + row * 2)
    word_b = tl.load(grid_ptr + row * 2 + 1)
    scale_a = word_a.to(tl.int16).to(tl.float16, bitcast=True)
    scale_b = word_b.to(tl.int16).to(tl.float16, bitcast=True)
    zero_a = (word_a >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    zero_b = (word_b >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    WIDTH: tl.constexpr = 16 * LOW
    STEP: tl.constexpr = 16 * HIGH if HIGH > 0 else WIDTH
    M: tl.constexpr = (1 << LOW) - 1
    lane = tl.arange(0, STEP)
    if HIGH > 0:
        high = tl.load(high_ptr + row[:, None] * STEP + lane[None, :])
    for h in tl.static_range(WIDTH // STEP):
        low = tl.load(low_ptr + row[:, None] * WIDTH + h * STEP + lane[None, :])
        for j in tl.static_range(8 // LOW):
            a = (low >> (LOW * j)) & M
            b = (low >> (LOW * j + 8)) & M
            if HIGH > 0:
                shift = HIGH * (j * (WIDTH // STEP) + h)
                a |= ((high >> shift) & ((1 << HIGH) - 1)) << LOW
                b |= ((high >> (shift + 8)) & ((1 << HIGH) - 1)) << LOW
            column = j * WIDTH + h * STEP + lane
            _store_field(a, scale_a, zero_a, out_a, column, live_a, row_mask)
            _store_field(b, scale_b, zero_b, out_b, column, live_b, row_mask)


@triton.jit(do_not_specialize=["first_tile", "first_output"])
def _dequantize_kernel(
    planes_ptr: tl.tensor,
    grid_ptr: tl.tensor,
    pairs_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    out_ptr: tl.tensor,
    first_tile: tl.tensor,
    first_output: tl.tensor,
    K: tl.tensor,
    ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    tile_ptr = tiles_ptr + (first_tile + tl.program_id(0)) * 5
    first_pair = tl.load(tile_ptr)
    if tl.program_id(1) < tl.load(tile_ptr + 1):
        pair = pairs_ptr + (first_pair + tl.program_id(1)) * 8
        row = tl.load(tile_ptr + 2) + tl.arange(0, ROWS)
        output = tl.load(tile_ptr + 3) - first_output + tl.arange(0, ROWS)
        row_mask = tl.arange(0, ROWS) < tl.load(tile_ptr + 4)
        width = tl.load(pair)
        low = planes_ptr + tl.multiple_of(tl.load(pair + 1).to(tl.int64) * 8, 8)
        high = planes_ptr + tl.multiple_of(tl.load(pair + 2).to(tl.int64) * 8, 8)
        grid = grid_ptr + tl.load(pair + 3).to(tl.int64) * 4
        out = out_ptr + output[:, None].to(tl.int64) * K
        out_a = out + tl.multiple_of(tl.load(pair + 4), 128)
        out_b = out + tl.multiple_of(tl.load(pair + 6), 128)
        live_a = tl.load(pair + 5)
        live_b = tl.load(pair + 7)
        if ALIGNED:  # or the masks would split every store into single elements
            live_a = tl.multiple_of(live_a, 16)
            live_b = tl.multiple_of(live_b, 16)
        if width == 1:
            _expand_pair(low, high, grid, out_a, out_b, live_a, live_b, row, row_mask, 1, 0)
        elif width == 2:
            _expand_pair(low, high, grid, out_a, out_b, live_a, live_b, row, row_mask, 2, 0)
        elif width == 3:
            _expand_pair(low, high, grid, out_a, out_b, live_a, live_b, row, row_mask, 2, 1)
        elif width == 4:
            _expand_pair(low, high, grid, out_a, out_b, live_a, live_b, row, row_mask, 4, 0)
        elif width == 5:
            _expand_pair(low, high, grid, out_a, out_b, live_a, live_b, row, row_mask, 4, 1)
        elif width == 6:
            _expand_pair(low, high, grid, out_a, out_b, live_a, live_b, row, row_mask, 4, 2)
        else:
            _expand_pair(low, high, grid, out_a, out_b, live_a, live_b, row, row_mask, 8, 0)


@dataclass(frozen=True)
class RowRun:
    """Consecutive tiles whose rows are written together: outputs [first, first + rows)."""

    first_tile: int
    tiles: int
    first: int
    rows: int


class Dequantizer:
    """Writes runs of dequantized rows of one `RuntimeWeight`."""

    def __init__(self, weight: RuntimeWeight, max_rows: int, tile: DequantizeTile = RULE) -> None:
        """Runs hold `max_rows` rows, rounded up to whole tiles, but for the last."""
        device = weight.planes.device
        self._weight = weight
        self._tile = tile
        self._pair_limit = max(len(member.pairs) for member in weight.members)
        columns = group_columns(weight.K)
        pairs: list[list[int]] = []
        tiles: list[tuple[int, int, int, int, int]] = []
        for member in weight.members:
            first_pair = len(pairs)
            for pair in member.pairs:
                places = [
                    x
                    for group in pair.groups
                    for x in ((0, 0) if group is None else (group * GROUP_SIZE, columns[group]))
                ]
                pairs.append(
                    [pair.width, pair.low // 16, pair.high // 16, pair.grid // 16, *places]
                )
            tiles += [
                (first_pair, len(member.pairs), row, member.first_output + row, live)
                for row, live in _tiles(member, tile.rows)
            ]
        self._pairs = torch.tensor(pairs, dtype=torch.int32, device=device)
        self._tiles = torch.tensor(tiles, dtype=torch.int32, device=device)
        self.runs = row_runs(weight, max_rows, tile.rows)

    def __call__(self, run: RowRun, out: Tensor) -> None:
        """Fill out [run.rows, K], f16, bf16 or f32, contiguous; of dropped groups nothing."""
        _dequantize_kernel[(run.tiles, self._pair_limit)](
            self._weight.planes.view(torch.int16),
            self._weight.grid,
            self._pairs,
            self._tiles,
            out,
            run.first_tile,
            run.first,
            self._weight.K,
            ROWS=self._tile.rows,
            ALIGNED=self._weight.K % 16 == 0,
            num_warps=self._tile.warps,
        )


def row_runs(weight: RuntimeWeight, max_rows: int, tile_rows: int = RULE.rows) -> list[RowRun]:
    """All outputs in runs of `max_rows` rows, rounded up to whole tiles, but for the last."""
    whole = -(-max_rows // tile_rows) * tile_rows
    tiles = [
        (member.first_output + row, rows)
        for member in weight.members
        for row, rows in _tiles(member, tile_rows)
    ]
    runs: list[RowRun] = []
    for i, (first, rows) in enumerate(tiles):
        last = runs[-1] if runs else None
        if last is not None and last.rows + rows <= whole:
            runs[-1] = RowRun(last.first_tile, last.tiles + 1, last.first, last.rows + rows)
        else:
            runs.append(RowRun(i, 1, first, rows))
    return runs


def _tiles(member: Member, tile_rows: int) -> list[tuple[int, int]]:
    """(first row, rows) of each tile of a member."""
    return [(row, min(tile_rows, member.N - row)) for row in range(0, member.N, tile_rows)]
