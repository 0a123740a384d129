"""What lies between the products of a Llama decode step, as three Triton kernels.

Both models of `decode.py` run these. Each begins while the launch before it drains (programmatic
dependent launch) and reads what that one wrote only after `gdc_wait`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

EPSILON = 1e-5
LOG2_E = tl.constexpr(1.4426950408889634)
TILE = 64
PROGRAMS = 512  # that keep an H200 busy; measured
MOST_SPLITS = 16  # of which one program merges the answers
GATE_BLOCK = 512


@triton.jit
def _begin(OVERLAP: tl.constexpr) -> None:
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def _wait(OVERLAP: tl.constexpr) -> None:
    if OVERLAP:
        gdc_wait()


@triton.jit
def _add_norm_kernel(
    hidden_ptr: tl.tensor,
    added_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    out_ptr: tl.tensor,
    EPS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    _begin(OVERLAP)
    row = tl.program_id(0) * SIZE
    hidden_ptr, added_ptr, out_ptr = hidden_ptr + row, added_ptr + row, out_ptr + row
    i = tl.arange(0, BLOCK)
    mask = i < SIZE
    scale = tl.load(scale_ptr + i, mask=mask, other=0.0)
    _wait(OVERLAP)
    total = tl.load(hidden_ptr + i, mask=mask, other=0.0) + tl.load(
        added_ptr + i, mask=mask, other=0.0
    )
    tl.store(hidden_ptr + i, total, mask=mask)
    wide = total.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, axis=0) / SIZE + EPS)
    tl.store(out_ptr + i, (wide * inverse).to(tl.float16) * scale, mask=mask)


@triton.jit
def _gate_kernel(
    gate_up_ptr: tl.tensor,
    out_ptr: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    _begin(OVERLAP)
    row = tl.program_id(1) * SIZE
    gate_up_ptr, out_ptr = gate_up_ptr + 2 * row, out_ptr + row
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < SIZE
    _wait(OVERLAP)
    gate = tl.load(gate_up_ptr + i, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + SIZE + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, gate * tl.sigmoid(gate) * up, mask=mask)


@triton.jit
def _rotated(
    heads_ptr: tl.tensor, cosine: tl.tensor, sine: tl.tensor, SIZE: tl.constexpr
) -> tl.tensor:
    """fp32 [n, SIZE] of heads that start at the pointers [n, 1]."""
    d = tl.arange(0, SIZE)[None, :]
    other = tl.load(heads_ptr + (d + SIZE // 2) % SIZE).to(tl.float32)
    turned = tl.where(d < SIZE // 2, -other, other)
    return tl.load(heads_ptr + d).to(tl.float32) * cosine + turned * sine


@triton.jit
def _scores(query: tl.tensor, keys: tl.tensor, stale: tl.tensor) -> tl.tensor:
    """fp32 [rows, positions], of which `stale` [positions] count for nothing."""
    return tl.where(stale[None, :], float("-inf"), tl.dot(query, tl.trans(keys)))


@triton.jit
def _fold(
    score: tl.tensor,
    values: tl.tensor,
    largest: tl.tensor,
    total: tl.tensor,
    mixed: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The softmax of a run of positions, after `score` [rows, positions] of more of them.

    Of each row its largest score, its sum of weights and its values mixed by these.
    """
    before = largest
    largest = tl.maximum(before, tl.max(score, axis=1))
    kept = tl.exp2(before - largest)
    weight = tl.exp2(score - largest[:, None])
    total = total * kept + tl.sum(weight, axis=1)
    mixed = tl.dot(weight.to(tl.float16), values, mixed * kept[:, None])
    return largest, total, mixed


@triton.jit
def _attend_kernel(
    qkv_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    cosine_ptr: tl.tensor,
    sine_ptr: tl.tensor,
    place_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    extent_ptr: tl.tensor,
    counter_ptr: tl.tensor,
    out_ptr: tl.tensor,
    CACHE: tl.constexpr,
    HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    POSITIONS: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """HEADS of keys and values, each of SHARE queries; each split of the cache is one program's.

    A program takes its positions a tile of POSITIONS at a time. Scores are in powers of two.
    """
    _begin(OVERLAP)
    RUN: tl.constexpr = CACHE // SPLITS
    ROWS: tl.constexpr = max(SHARE, 16)  # what a product of tiles takes; the last repeat a query
    split = tl.program_id(0)
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    own = (sequence * HEADS + head).to(tl.int64)
    keys_ptr += own * CACHE * SIZE
    values_ptr += own * CACHE * SIZE
    qkv_ptr += sequence * (HEADS * (SHARE + 2) * SIZE)
    first = split * RUN
    i = tl.arange(0, POSITIONS)
    d = tl.arange(0, SIZE)
    row = tl.arange(0, ROWS)
    at = (first + i)[:, None] * SIZE + d[None, :]
    # The first tile comes before the wait: earlier steps wrote it, no launch nearby does.
    keys = tl.load(keys_ptr + at)
    values = tl.load(values_ptr + at)
    place = tl.load(place_ptr).to(tl.int32)
    cosine = tl.load(cosine_ptr + place * SIZE + d).to(tl.float32)[None, :]
    sine = tl.load(sine_ptr + place * SIZE + d).to(tl.float32)[None, :]
    _wait(OVERLAP)
    query_ptr = qkv_ptr + (head * SHARE + tl.minimum(row, SHARE - 1))[:, None] * SIZE
    query = _rotated(query_ptr, cosine, sine, SIZE) * (SIZE**-0.5 * LOG2_E)
    query = query.to(tl.float16)
    key = _rotated(qkv_ptr + (HEADS * SHARE + head) * SIZE, cosine, sine, SIZE).to(tl.float16)
    value = tl.load(qkv_ptr + (HEADS * (SHARE + 1) + head) * SIZE + d)[None, :]
    owner = (place >= first) & (place < first + RUN)
    tl.store(keys_ptr + place * SIZE + d[None, :], key, mask=owner)
    tl.store(values_ptr + place * SIZE + d[None, :], value, mask=owner)
    # The new token begins its run; what the cache held in its place is stale. In other runs its
    # score of -inf lets the first tile take it out.
    largest = tl.sum(query.to(tl.float32) * key.to(tl.float32), axis=1)
    largest = tl.where(owner, largest, float("-inf"))
    total = tl.full([ROWS], 1.0, tl.float32)
    mixed = tl.zeros([ROWS, SIZE], tl.float32) + value
    score = _scores(query, keys, first + i == place)
    largest, total, mixed = _fold(score, values, largest, total, mixed)
    for start in range(POSITIONS, RUN, POSITIONS):
        keys = tl.load(keys_ptr + start * SIZE + at)
        score = _scores(query, keys, first + start + i == place)
        values = tl.load(values_ptr + start * SIZE + at)
        largest, total, mixed = _fold(score, values, largest, total, mixed)
    mixed /= total[:, None]
    heads = own * SHARE + row
    real = (row < SHARE)[:, None]
    if SPLITS == 1:
        out_ptr += heads[:, None] * SIZE + d[None, :]
        tl.store(out_ptr, mixed.to(tl.float16), mask=real)
    else:
        part = heads * SPLITS + split
        tl.store(partial_ptr + part[:, None] * SIZE + d[None, :], mixed, mask=real)
        tl.store(extent_ptr + part, largest + tl.log2(total), mask=row < SHARE)
        tl.debug_barrier()  # all warps have written before the count says so
        arrived = tl.atomic_add(counter_ptr + own, 1, sem="acq_rel")
        if arrived == SPLITS - 1:  # the last merges the splits, each by its share of the softmax
            head_of = own * SHARE + tl.arange(0, SHARE)
            parts = head_of[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :]
            extent = tl.load(extent_ptr + parts, cache_modifier=".cg")
            weight = tl.exp2(extent - tl.max(extent, axis=1)[:, None])
            weight /= tl.sum(weight, axis=1)[:, None]
            found = tl.load(
                partial_ptr + parts[:, :, None] * SIZE + d[None, None, :], cache_modifier=".cg"
            )
            merged = tl.sum(found * weight[:, :, None], axis=1)
            tl.store(out_ptr + head_of[:, None] * SIZE + d[None, :], merged.to(tl.float16))
            tl.atomic_xchg(counter_ptr + own, 0)


class Glue:
    """The kernels and their scratch for one model shape; `overlap` off is for the interpreter."""

    def __init__(
        self,
        heads: int,
        size: int,
        cache: int,
        device: torch.device,
        *,
        batch: int = 1,
        kv_heads: int | None = None,
        overlap: bool = True,
    ) -> None:
        """heads of `size`, `cache` positions, a multiple of 64, of `batch` sequences B.

        kv_heads: of keys and values, as many where left out; each serves a power of two of heads.
        """
        self.heads, self.size, self.cache = heads, size, cache
        self.kv_heads = kv_heads or heads
        tiles = cache // TILE
        wanted = triton.next_power_of_2(triton.cdiv(PROGRAMS, batch * self.kv_heads))
        self.splits = min(wanted, tiles & -tiles, MOST_SPLITS)
        self._overlap = overlap
        self._launch = {"launch_pdl": True} if overlap else {}
        parts = batch * heads * self.splits
        self._partial = torch.empty(parts * size, device=device)
        self._extent = torch.empty(parts, device=device)
        self._counter = torch.zeros(batch * self.kv_heads, dtype=torch.int32, device=device)

    def add_norm(self, hidden: Tensor, added: Tensor, scale: Tensor) -> Tensor:
        """RMS norm [B, n] of hidden + added; hidden becomes the sum. All fp16."""
        out = torch.empty_like(hidden)
        n = hidden.shape[-1]
        _add_norm_kernel[(len(hidden),)](
            hidden,
            added,
            scale,
            out,
            EPS=EPSILON,
            SIZE=n,
            BLOCK=triton.next_power_of_2(n),
            OVERLAP=self._overlap,
            num_warps=4,
            **self._launch,
        )
        return out

    def gate(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up, fp16 [B, n] of [B, 2n]."""
        n = gate_up.shape[-1] // 2
        out = gate_up.new_empty(len(gate_up), n)
        _gate_kernel[(triton.cdiv(n, GATE_BLOCK), len(gate_up))](
            gate_up,
            out,
            SIZE=n,
            BLOCK=GATE_BLOCK,
            OVERLAP=self._overlap,
            num_warps=4,
            **self._launch,
        )
        return out

    def attend(
        self,
        qkv: Tensor,
        keys: Tensor,
        values: Tensor,
        cosine: Tensor,
        sine: Tensor,
        place: Tensor,
    ) -> Tensor:
        """Attention fp16 [B, heads * size] of a token's qkv of each sequence over its whole cache.

        keys, values: [B, kv_heads, cache, size], to which these tokens' are added at `place`
        [1]. cosine, sine: [cache, size].
        """
        out = qkv.new_empty(len(qkv), self.heads * self.size)
        _attend_kernel[(self.splits, self.kv_heads, len(qkv))](
            qkv,
            keys,
            values,
            cosine,
            sine,
            place,
            self._partial,
            self._extent,
            self._counter,
            out,
            CACHE=self.cache,
            HEADS=self.kv_heads,
            SHARE=self.heads // self.kv_heads,
            SIZE=self.size,
            SPLITS=self.splits,
            POSITIONS=TILE,
            OVERLAP=self._overlap,
            num_warps=4,
            num_stages=2,
            **self._launch,
        )
        return out
