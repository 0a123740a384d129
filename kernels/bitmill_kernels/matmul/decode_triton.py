"""One launch for any mix of widths: y = x W^T for up to 64 tokens, W in the runtime layout.

    y[t, n] = factor[t] * sum over groups g of
              scale[n, g] * (sum_k code[n, k] * rows[t, k] - zero[n, g] * sums[g, t])  + bias[n]

Codes enter the tensor cores as fp16 subnormals: one AND selects a field of two columns at once
and leaves it where it stands in its byte; the prologue has scaled the activations to make up for
it. Codes are exact in fp16 and sums are fp32, so the result is more accurate than a product with
a dequantized half-precision weight. Codes biased by a magic exponent were given up: their bias
is lost to the truncating accumulator of the tensor cores when the inputs have a mean.

A program takes BN rows and one of `split` slices of the pairs, cut by bytes. Partial sums go to a
workspace; the last program of a row tile adds them in order, so the result is bitwise the same
on every launch. It leaves the tile's counter at zero for the next launch or graph replay.

Each class of widths that is absent is compiled out (MASK), so a kernel is compiled for each set of
widths that a model uses, and for each launch shape, whatever its slices. Weights are 16-byte
asynchronous copies, some stages deep. Inline assembly works on two 16-bit lanes at once; Triton's
interpreter runs its plain twin (ASM=False).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitmill_kernels.layout import GROUP_SIZE, WIDTHS
from bitmill_kernels.matmul.prologue import prologue_triton
from bitmill_kernels.matmul.runtime import Member, RuntimeWeight
from bitmill_kernels.matmul.units import divides_rows
from bitmill_kernels.workspace import workspace

SEGMENT_FIELDS = 8
TOKEN_TILES = (8, 16, 32, 64)
"""Tokens that a launch can be compiled for."""

ROWS = (16, 32, 64, 128, 256)
WARPS = (1, 2, 4, 8, 16)
MAX_STAGES = 8
"""What launch shapes are made of: powers of two, from the rows of a tensor core's product on."""


@triton.jit
def _field(lanes: tl.tensor, MASK: tl.constexpr, ASM: tl.constexpr) -> tl.tensor:
    """lanes & MASK, read as fp16."""
    if ASM:
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, $2;",
            "=r,r,r",
            [lanes, tl.full((1, 1), MASK, tl.int16)],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        return (lanes & MASK).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _joined_field(
    low: tl.tensor, high: tl.tensor, LOW: tl.constexpr, HIGH: tl.constexpr, ASM: tl.constexpr
) -> tl.tensor:
    """(low & LOW) | (high & HIGH), read as fp16."""
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; and.b32 t, $2, $4; lop3.b32 $0, $1, $3, t, 0xEA; }",
            "=r,r,r,r,r",
            [low, high, tl.full((1, 1), LOW, tl.int16), tl.full((1, 1), HIGH, tl.int16)],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        return ((low & LOW) | (high & HIGH)).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _shift_right(lanes: tl.tensor, COUNT: tl.constexpr, ASM: tl.constexpr) -> tl.tensor:
    """Both 16-bit lanes at once; bits that cross lanes fall outside every mask used."""
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; and.b32 t, $2, 31; shr.u32 $0, $1, t; }",
            "=r,r,r",
            [lanes, tl.full((1, 1), COUNT, tl.int16)],
            dtype=tl.int16,
            is_pure=True,
            pack=2,
        )
    else:
        return (lanes >> COUNT).to(tl.int16)


@triton.jit
def _shift_left(lanes: tl.tensor, COUNT: tl.constexpr, ASM: tl.constexpr) -> tl.tensor:
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; and.b32 t, $2, 31; shl.b32 $0, $1, t; }",
            "=r,r,r",
            [lanes, tl.full((1, 1), COUNT, tl.int16)],
            dtype=tl.int16,
            is_pure=True,
            pack=2,
        )
    else:
        return (lanes << COUNT).to(tl.int16)


@triton.jit
def _pair_products(
    low_ptr: tl.tensor,
    high_ptr: tl.tensor,
    x_ptr: tl.tensor,
    x_mask: tl.tensor,
    row: tl.tensor,
    lane: tl.tensor,
    BN: tl.constexpr,
    TOKENS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ASM: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Code products f32 [BN, TOKENS] of the two groups of a pair."""
    FIELDS: tl.constexpr = 8 // LOW
    WIDTH: tl.constexpr = 16 * LOW
    M: tl.constexpr = (1 << LOW) - 1
    a = tl.zeros((BN, TOKENS), tl.float32)
    b = tl.zeros((BN, TOKENS), tl.float32)
    if HIGH == 0:
        w = tl.load(low_ptr + row[:, None] * WIDTH + lane[None, :])
        upper = _shift_right(w, 8, ASM)
        for j in tl.static_range(FIELDS):
            xa = tl.load(x_ptr + j * WIDTH, mask=x_mask, other=0.0)
            a = tl.dot(_field(w, M << (LOW * j), ASM), xa, a)
        for j in tl.static_range(FIELDS):
            xb = tl.load(x_ptr + 128 + j * WIDTH, mask=x_mask, other=0.0)
            b = tl.dot(_field(upper, M << (LOW * j), ASM), xb, b)
    else:
        HIGH_WIDTH: tl.constexpr = 16 * HIGH
        SLICES: tl.constexpr = LOW // HIGH
        H: tl.constexpr = ((1 << HIGH) - 1) << LOW
        high = tl.load(high_ptr + row[:, None] * HIGH_WIDTH + lane[None, :])
        for h in tl.static_range(SLICES):
            offset = h * HIGH_WIDTH
            w = tl.load(low_ptr + row[:, None] * WIDTH + offset + lane[None, :])
            upper = _shift_right(w, 8, ASM)
            high_a = _shift_left(high, LOW - HIGH * h, ASM)
            high_b = _shift_right(high, 8 - LOW + HIGH * h, ASM)
            for j in tl.static_range(FIELDS):
                xa = tl.load(x_ptr + offset + j * WIDTH, mask=x_mask, other=0.0)
                field = _joined_field(w, high_a, M << (LOW * j), H << (LOW * j), ASM)
                a = tl.dot(field, xa, a)
            for j in tl.static_range(FIELDS):
                xb = tl.load(x_ptr + 128 + offset + j * WIDTH, mask=x_mask, other=0.0)
                field = _joined_field(upper, high_b, M << (LOW * j), H << (LOW * j), ASM)
                b = tl.dot(field, xb, b)
    return a, b


@triton.jit
def _class_products(
    total: tl.tensor,
    segment_ptr: tl.tensor,
    planes_ptr: tl.tensor,
    grid_ptr: tl.tensor,
    x_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    row: tl.tensor,
    token: tl.tensor,
    T: tl.tensor,
    columns: tl.tensor,
    BN: tl.constexpr,
    TOKENS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ASM: tl.constexpr,
) -> tl.tensor:
    """Add the pairs of one class in this slice to total f32 [BN, TOKENS]."""
    first = tl.load(segment_ptr)
    count = tl.load(segment_ptr + 1)
    low = planes_ptr + tl.multiple_of(tl.load(segment_ptr + 2).to(tl.int64) * 8, 8)
    high = planes_ptr + tl.multiple_of(tl.load(segment_ptr + 3).to(tl.int64) * 8, 8)
    grid = grid_ptr + tl.load(segment_ptr + 4).to(tl.int64) * 4
    rows = tl.multiple_of(tl.load(segment_ptr + 5), 128).to(tl.int64)
    lane = tl.arange(0, 16 * (HIGH if HIGH > 0 else LOW))
    x_mask = (token[None, :] < T) & (lane[:, None] >= 0)
    for i in range(count):
        pair = first + i
        x_tile = x_ptr + pair * 256 + lane[:, None] + token[None, :] * columns
        a, b = _pair_products(
            low + i * rows * 16 * LOW,
            high + i * rows * 16 * HIGH,
            x_tile,
            x_mask,
            row,
            lane,
            BN,
            TOKENS,
            LOW,
            HIGH,
            ASM,
        )
        word_a = tl.load(grid + (i * rows + row) * 2)
        word_b = tl.load(grid + (i * rows + row) * 2 + 1)
        sum_a = tl.load(sums_ptr + pair * 2 * TOKENS + token)
        sum_b = tl.load(sums_ptr + (pair * 2 + 1) * TOKENS + token)
        scale_a = word_a.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        scale_b = word_b.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        zero_a = (word_a >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        zero_b = (word_b >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        total += scale_a[:, None] * (a - zero_a[:, None] * sum_a[None, :])
        total += scale_b[:, None] * (b - zero_b[:, None] * sum_b[None, :])
    return total


@triton.jit(do_not_specialize=["T", "split"])
def decode_kernel(
    x_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    factor_ptr: tl.tensor,
    planes_ptr: tl.tensor,
    grid_ptr: tl.tensor,
    segments_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    counter_ptr: tl.tensor,
    y_ptr: tl.tensor,
    N: tl.tensor,
    T: tl.tensor,
    columns: tl.tensor,
    split: tl.tensor,
    BN: tl.constexpr,
    TOKENS: tl.constexpr,
    MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ASM: tl.constexpr,
) -> None:
    """The kernel of the module docstring; `launch_decode` names the tensors."""
    tile = tl.program_id(0)
    part = tl.program_id(1)
    member = tl.load(tiles_ptr + tile * 4)
    row = tl.load(tiles_ptr + tile * 4 + 1) + tl.arange(0, BN)
    output = tl.load(tiles_ptr + tile * 4 + 2) + tl.arange(0, BN)
    live_row = tl.arange(0, BN) < tl.load(tiles_ptr + tile * 4 + 3)
    token = tl.arange(0, TOKENS)
    segment = segments_ptr + (member * split + part) * 56
    total = tl.zeros((BN, TOKENS), tl.float32)
    if MASK & 1:
        total = _class_products(
            total, segment, planes_ptr, grid_ptr, x_ptr, sums_ptr, row, token, T, columns,
            BN, TOKENS, 1, 0, ASM,
        )  # fmt: skip
    if MASK & 2:
        total = _class_products(
            total, segment + 8, planes_ptr, grid_ptr, x_ptr, sums_ptr, row, token, T, columns,
            BN, TOKENS, 2, 0, ASM,
        )  # fmt: skip
    if MASK & 4:
        total = _class_products(
            total, segment + 16, planes_ptr, grid_ptr, x_ptr, sums_ptr, row, token, T, columns,
            BN, TOKENS, 2, 1, ASM,
        )  # fmt: skip
    if MASK & 8:
        total = _class_products(
            total, segment + 24, planes_ptr, grid_ptr, x_ptr, sums_ptr, row, token, T, columns,
            BN, TOKENS, 4, 0, ASM,
        )  # fmt: skip
    if MASK & 16:
        total = _class_products(
            total, segment + 32, planes_ptr, grid_ptr, x_ptr, sums_ptr, row, token, T, columns,
            BN, TOKENS, 4, 1, ASM,
        )  # fmt: skip
    if MASK & 32:
        total = _class_products(
            total, segment + 40, planes_ptr, grid_ptr, x_ptr, sums_ptr, row, token, T, columns,
            BN, TOKENS, 4, 2, ASM,
        )  # fmt: skip
    if MASK & 64:
        total = _class_products(
            total, segment + 48, planes_ptr, grid_ptr, x_ptr, sums_ptr, row, token, T, columns,
            BN, TOKENS, 8, 0, ASM,
        )  # fmt: skip
    out = y_ptr + token[None, :].to(tl.int64) * N + output[:, None]
    live = live_row[:, None] & (token[None, :] < T)
    factor = tl.load(factor_ptr + token, mask=token < T, other=0.0)
    bias = tl.zeros((BN,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + output, mask=live_row, other=0.0).to(tl.float32)
    if split > 1:
        cells = tl.num_programs(0) * BN * TOKENS
        here = partial_ptr + (tile * BN + tl.arange(0, BN))[:, None] * TOKENS + token[None, :]
        tl.store(here + part * cells, total)
        tl.debug_barrier()
        arrived = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel")
        if arrived == split - 1:
            total = tl.zeros((BN, TOKENS), tl.float32)
            for i in range(split):
                total += tl.load(here + i * cells, cache_modifier=".cg")
            y = total * factor[None, :] + bias[:, None]
            tl.store(out, y.to(y_ptr.dtype.element_ty), mask=live)
            tl.atomic_xchg(counter_ptr + tile, 0)
    else:
        y = total * factor[None, :] + bias[:, None]
        tl.store(out, y.to(y_ptr.dtype.element_ty), mask=live)


@dataclass(frozen=True)
class Tile:
    """Launch shape: BN rows, `split` slices of the pairs, warps and pipeline stages.

    Raises ValueError for one that no weight can be multiplied by.
    """

    rows: int
    split: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        if self.rows not in ROWS or self.warps not in WARPS:
            raise ValueError(f"{self}: rows must be one of {ROWS}, warps one of {WARPS}")
        if self.split < 1 or not 1 <= self.stages <= MAX_STAGES:
            raise ValueError(f"{self}: split must be 1 or more, stages 1 to {MAX_STAGES}")

    def suits(self, weight: RuntimeWeight) -> bool:
        """Whether tiles end where the members' rows end, and no member has fewer pairs than slices
        are cut."""
        fewest = min(len(member.pairs) for member in weight.members)
        return divides_rows(weight, self.rows) and self.split <= fewest


@dataclass(frozen=True)
class DecodeTables:
    """Device tables of one launch shape: segments i32, tiles i32 [tiles, 4], counters i32."""

    tile: Tile
    segments: Tensor
    tiles: Tensor
    counters: Tensor


def build_tables(weight: RuntimeWeight, tile: Tile) -> DecodeTables:
    """Tables for a launch shape. Raises ValueError where it does not suit the weight."""
    if not tile.suits(weight):
        raise ValueError(
            f"{tile} cannot run N={weight.N}, K={weight.K}: rows must divide the padded rows "
            f"{[member.rows for member in weight.members]} of every linear, and split be at most "
            f"the fewest pairs of groups of any, {[len(member.pairs) for member in weight.members]}"
        )
    device = weight.planes.device
    tiles = [
        (index, n0, member.first_output + n0, max(0, min(tile.rows, member.N - n0)))
        for index, member in enumerate(weight.members)
        for n0 in range(0, member.rows, tile.rows)
    ]
    segments: list[list[int]] = []
    first_pair = 0
    for member in weight.members:
        segments += _segments(member, first_pair, tile.split)
        first_pair += len(member.pairs)
    return DecodeTables(
        tile,
        torch.tensor(segments, dtype=torch.int32, device=device),
        torch.tensor(tiles, dtype=torch.int32, device=device),
        torch.zeros(len(tiles), dtype=torch.int32, device=device),
    )


def _segments(member: Member, first_pair: int, split: int) -> list[list[int]]:
    """Rows (first pair, count, low, high, grid, rows, 0, 0) for each slice and class."""
    cost = [32 * pair.width + 8 for pair in member.pairs]
    total, done = sum(cost), 0
    table = [[0] * SEGMENT_FIELDS for _ in range(split * len(WIDTHS))]
    for i, pair in enumerate(member.pairs):
        part = min(split - 1, done * split // total)
        done += cost[i]
        row = table[part * len(WIDTHS) + WIDTHS.index(pair.width)]
        if row[1] == 0:
            addresses = [pair.low // 16, pair.high // 16, pair.grid // 16]
            row[:] = [first_pair + i, 0, *addresses, member.rows, 0, 0]
        row[1] += 1
    return table


class TritonDecoder:
    """y [T, N] = x W^T for up to `max_tokens`; tables and workspaces are built once."""

    def __init__(self, weight: RuntimeWeight, tiles: Mapping[int, Tile], *, asm: bool) -> None:
        """tiles: a launch shape for each of some token tiles of `TOKEN_TILES`."""
        device = weight.planes.device
        slots = weight.slots.shape[0]
        self._weight = weight
        self._asm = asm
        self._tables = {tokens: build_tables(weight, tiles[tokens]) for tokens in sorted(tiles)}
        self.max_tokens = tokens = max(tiles)
        largest = max(
            tile.split * self._tables[tokens].tiles.shape[0] * tile.rows * tokens
            for tokens, tile in tiles.items()
        )
        self._partial = workspace("decode partial", 4 * largest, device)
        self._rows = workspace("decode inputs", 2 * tokens * slots * GROUP_SIZE, device)
        self._sums = workspace("decode sums", 4 * tokens * slots, device)
        self._factor = workspace("decode factor", 4 * tokens, device)

    def __call__(self, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
        """x [T, K] with contiguous rows, y [T, N] contiguous, bias [N] or None."""
        T, slots = x.shape[0], self._weight.slots.shape[0]
        tile = next(tokens for tokens in self._tables if tokens >= T)
        rows = self._rows.view(torch.float16)[: T * slots * GROUP_SIZE].view(T, -1)
        sums = self._sums.view(torch.float32)[: slots * tile].view(slots, tile)
        factor = self._factor.view(torch.float32)
        partial = self._partial.view(torch.float32)
        prologue_triton(x, self._weight, rows, sums, factor)
        launch_decode(
            self._weight,
            self._tables[tile],
            rows,
            sums,
            factor,
            bias,
            partial,
            y,
            asm=self._asm,
        )


def launch_decode(
    weight: RuntimeWeight,
    tables: DecodeTables,
    rows: Tensor,
    sums: Tensor,
    factor: Tensor,
    bias: Tensor | None,
    partial: Tensor,
    y: Tensor,
    *,
    asm: bool,
) -> None:
    """y [T, N] from the prologue's rows f16 [T, 256 * pairs], sums f32 [2 * pairs, TOKENS] and
    factor f32 [T]; partial f32 is a workspace of at least split * padded rows * TOKENS."""
    tile = tables.tile
    decode_kernel[(tables.tiles.shape[0], tile.split)](
        rows,
        sums,
        factor,
        weight.planes.view(torch.int16),
        weight.grid,
        tables.segments,
        tables.tiles,
        y if bias is None else bias,
        partial,
        tables.counters,
        y,
        weight.N,
        y.shape[0],
        rows.shape[1],
        tile.split,
        BN=tile.rows,
        TOKENS=sums.shape[1],
        MASK=weight.width_mask,
        HAS_BIAS=bias is not None,
        ASM=asm,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
