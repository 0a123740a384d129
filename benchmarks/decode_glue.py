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
LEAST_ROWS = 16  # of a product of tiles
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
def _within(position: tl.tensor, first: tl.tensor, COUNT: tl.constexpr) -> tl.tensor:
    """Whether positions are of so many from the first on."""
    return (position >= first) & (position < first + COUNT)


@triton.jit
def _scores(query: tl.tensor, keys: tl.tensor, counted: tl.tensor) -> tl.tensor:
    """fp32 [rows, positions], of which those that are not `counted` are -inf."""
    return tl.where(counted, tl.dot(query, tl.trans(keys)), float("-inf"))


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
    STEP: tl.constexpr,
    SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    POSITIONS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP_ROWS: tl.constexpr,
    MERGED: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """HEADS of keys and values, each of SHARE queries of STEP tokens; a split is one program's.

    A program takes its positions a tile of POSITIONS at a time. Scores are in powers of two. ROWS,
    STEP_ROWS and MERGED are queries, tokens and queries in the sizes that tiles may have: what is
    more than there are repeats the last.
    """
    _begin(OVERLAP)
    RUN: tl.constexpr = CACHE // SPLITS
    QUERIES: tl.constexpr = SHARE * STEP
    ALL: tl.constexpr = HEADS * (SHARE + 2) * SIZE  # of a token's queries, keys and values
    split = tl.program_id(0)
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    own = (sequence * HEADS + head).to(tl.int64)
    keys_ptr += own * CACHE * SIZE
    values_ptr += own * CACHE * SIZE
    qkv_ptr += sequence * STEP * ALL
    first = split * RUN
    i = tl.arange(0, POSITIONS)
    d = tl.arange(0, SIZE)[None, :]
    row = tl.minimum(tl.arange(0, ROWS), QUERIES - 1)
    token = row // SHARE
    later = tl.minimum(tl.arange(0, STEP_ROWS), STEP - 1)
    at = (first + i)[:, None] * SIZE + d
    # The first tile comes before the wait: earlier steps wrote it, no launch nearby does.
    keys = tl.load(keys_ptr + at)
    values = tl.load(values_ptr + at)
    place = tl.load(place_ptr).to(tl.int32)
    turn = (place + token)[:, None] * SIZE + d
    cosine = tl.load(cosine_ptr + turn).to(tl.float32)
    sine = tl.load(sine_ptr + turn).to(tl.float32)
    here = place + later
    written = here[:, None] * SIZE + d
    own_cosine = tl.load(cosine_ptr + written).to(tl.float32)
    own_sine = tl.load(sine_ptr + written).to(tl.float32)
    _wait(OVERLAP)
    query_ptr = qkv_ptr + (token * ALL + (head * SHARE + row % SHARE) * SIZE)[:, None]
    query = _rotated(query_ptr, cosine, sine, SIZE) * (SIZE**-0.5 * LOG2_E)
    query = query.to(tl.float16)
    key_ptr = qkv_ptr + (later * ALL + (HEADS * SHARE + head) * SIZE)[:, None]
    own_keys = _rotated(key_ptr, own_cosine, own_sine, SIZE).to(tl.float16)
    own_values = tl.load(key_ptr + HEADS * SIZE + d)
    inside = _within(here, first, RUN) & (tl.arange(0, STEP_ROWS) < STEP)
    inside = inside[:, None]
    tl.store(keys_ptr + written, own_keys, mask=inside)
    tl.store(values_ptr + written, own_values, mask=inside)
    # What the cache held in the step's places is stale, and less than a tile. The tokens of the
    # step count in the run where they begin, each for itself and those behind it.
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, SIZE], tl.float32)
    score = _scores(query, keys, ~_within(first + i, place, STEP)[None, :])
    largest, total, mixed = _fold(score, values, largest, total, mixed)
    j = tl.arange(0, STEP_ROWS)[None, :]
    counted = (j <= token[:, None]) & _within(place, first, RUN)
    own_score = _scores(query, own_keys, counted)
    largest, total, mixed = _fold(own_score, own_values, largest, total, mixed)
    for start in range(POSITIONS, RUN, POSITIONS):
        keys = tl.load(keys_ptr + start * SIZE + at)
        score = _scores(query, keys, ~_within(first + start + i, place, STEP)[None, :])
        values = tl.load(values_ptr + start * SIZE + at)
        largest, total, mixed = _fold(score, values, largest, total, mixed)
    mixed /= total[:, None]
    real = tl.arange(0, ROWS) < QUERIES
    out_ptr += (sequence * STEP * HEADS + head) * SHARE * SIZE
    if SPLITS == 1:
        answer = (token * HEADS * SHARE + row % SHARE)[:, None]
        tl.store(out_ptr + answer * SIZE + d, mixed.to(tl.float16), mask=real[:, None])
    else:
        part = (own * QUERIES + row) * SPLITS + split
        tl.store(partial_ptr + part[:, None] * SIZE + d, mixed, mask=real[:, None])
        tl.store(extent_ptr + part, largest + tl.log2(total), mask=real)
        tl.debug_barrier()  # all warps have written before the count says so
        arrived = tl.atomic_add(counter_ptr + own, 1, sem="acq_rel")
        if arrived == SPLITS - 1:  # the last merges the splits, each by its share of the softmax
            query_of = tl.minimum(tl.arange(0, MERGED), QUERIES - 1)
            parts = (own * QUERIES + query_of) * SPLITS
            extents = extent_ptr + parts[:, None] + tl.arange(0, SPLITS)[None, :]
            top = tl.max(tl.load(extents, cache_modifier=".cg"), axis=1)
            weights = tl.zeros([MERGED], tl.float32)
            merged = tl.zeros([MERGED, SIZE], tl.float32)
            for s in tl.static_range(SPLITS):
                weight = tl.exp2(tl.load(extent_ptr + parts + s, cache_modifier=".cg") - top)
                found_ptr = partial_ptr + (parts + s)[:, None] * SIZE + d
                weights += weight
                merged += tl.load(found_ptr, cache_modifier=".cg") * weight[:, None]
            merged /= weights[:, None]
            answer = (query_of // SHARE * HEADS * SHARE + query_of % SHARE)[:, None]
            tl.store(out_ptr + answer * SIZE + d, merged.to(tl.float16))
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
        step: int = 1,
        kv_heads: int | None = None,
        overlap: bool = True,
    ) -> None:
        """heads of `size`, `cache` positions, a multiple of 64, of `batch` sequences B.

        step: tokens S of each sequence in a step, at most 32. kv_heads: of keys and values, as
        many as heads where left out.
        """
        self.heads, self.size, self.cache, self.step = heads, size, cache, step
        self.kv_heads = kv_heads or heads
        tiles = cache // TILE
        wanted = triton.next_power_of_2(triton.cdiv(PROGRAMS, batch * self.kv_heads))
        self.splits = min(wanted, tiles & -tiles, MOST_SPLITS)
        self._overlap = overlap
        self._launch = {"launch_pdl": True} if overlap else {}
        parts = batch * step * heads * self.splits
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
        """Attention fp16 [B * S, heads * size] of qkv of S tokens of each sequence in turn.

        Each token attends to the whole cache, and of its step to itself and those before it.
        keys, values: [B, kv_heads, cache, size], to which these tokens' are added from `place` [1]
        on. cosine, sine: [cache, size].
        """
        out = qkv.new_empty(len(qkv), self.heads * self.size)
        share = self.heads // self.kv_heads
        queries = triton.next_power_of_2(share * self.step)
        _attend_kernel[(self.splits, self.kv_heads, len(qkv) // self.step)](
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
            SHARE=share,
            STEP=self.step,
            SIZE=self.size,
            SPLITS=self.splits,
            POSITIONS=TILE,
            ROWS=max(queries, LEAST_ROWS),
            STEP_ROWS=max(triton.next_power_of_2(self.step), LEAST_ROWS),
            MERGED=queries,
            OVERLAP=self._overlap,
            num_warps=4,
            num_stages=2,
            **self._launch,
        )
        return out
