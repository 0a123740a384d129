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
TILE = 64
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
    head_ptr: tl.tensor, cosine: tl.tensor, sine: tl.tensor, SIZE: tl.constexpr
) -> tl.tensor:
    d = tl.arange(0, SIZE)
    other = tl.load(head_ptr + (d + SIZE // 2) % SIZE).to(tl.float32)
    turned = tl.where(d < SIZE // 2, -other, other)
    return tl.load(head_ptr + d).to(tl.float32) * cosine + turned * sine


@triton.jit
def _attend_kernel(
    qkv_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    cosine_ptr: tl.tensor,
    sine_ptr: tl.tensor,
    place_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    counter_ptr: tl.tensor,
    out_ptr: tl.tensor,
    CACHE: tl.constexpr,
    HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    SIZE: tl.constexpr,
    POSITIONS: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """HEADS of keys and values, each of SHARE queries."""
    _begin(OVERLAP)
    SPLITS: tl.constexpr = CACHE // POSITIONS
    head = tl.program_id(0)
    split = tl.program_id(1)
    first = tl.program_id(2).to(tl.int64) * HEADS  # of the sequence's heads
    qkv_ptr += first * (SHARE + 2) * SIZE
    keys_ptr += first * CACHE * SIZE
    values_ptr += first * CACHE * SIZE
    partial_ptr += first * SHARE * SPLITS * (SIZE + 2)
    counter_ptr += first
    out_ptr += first * SHARE * SIZE
    d = tl.arange(0, SIZE)
    position = split * POSITIONS + tl.arange(0, POSITIONS)
    at = (head * CACHE + position)[:, None] * SIZE + d[None, :]
    place = tl.load(place_ptr)
    keys = tl.load(keys_ptr + at)  # of earlier steps, like the values: no launch nearby writes them
    values = tl.load(values_ptr + at)
    cosine = tl.load(cosine_ptr + place * SIZE + d).to(tl.float32)
    sine = tl.load(sine_ptr + place * SIZE + d).to(tl.float32)
    _wait(OVERLAP)
    key = _rotated(qkv_ptr + (HEADS * SHARE + head) * SIZE, cosine, sine, SIZE).to(tl.float16)
    value = tl.load(qkv_ptr + (HEADS * (SHARE + 1) + head) * SIZE + d)
    new = (position == place)[:, None]
    keys = tl.where(new, key[None, :], keys)
    values = tl.where(new, value[None, :], values)
    written = new & (d >= 0)[None, :]
    tl.store(keys_ptr + at, keys, mask=written)
    tl.store(values_ptr + at, values, mask=written)
    wide_keys, wide_values = keys.to(tl.float32), values.to(tl.float32)
    for i in tl.static_range(SHARE):
        query = _rotated(qkv_ptr + (head * SHARE + i) * SIZE, cosine, sine, SIZE)
        score = tl.sum(wide_keys * query[None, :], axis=1) * (SIZE**-0.5)
        largest = tl.max(score, axis=0)
        weight = tl.exp(score - largest)
        mixed = tl.sum(wide_values * weight[:, None], axis=0)
        part = partial_ptr + ((head * SHARE + i) * SPLITS + split) * (SIZE + 2)
        tl.store(part + d, mixed)
        tl.store(part + SIZE, largest)
        tl.store(part + SIZE + 1, tl.sum(weight, axis=0))
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr + head, 1, sem="acq_rel")
    if arrived == SPLITS - 1:
        for i in tl.static_range(SHARE):
            parts = partial_ptr + ((head * SHARE + i) * SPLITS + tl.arange(0, SPLITS)) * (SIZE + 2)
            maxima = tl.load(parts + SIZE, cache_modifier=".cg")
            share = tl.exp(maxima - tl.max(maxima, axis=0))
            total = tl.sum(share * tl.load(parts + SIZE + 1, cache_modifier=".cg"), axis=0)
            rows = tl.load(parts[:, None] + d[None, :], cache_modifier=".cg")
            mixed = tl.sum(rows * share[:, None], axis=0) / total
            tl.store(out_ptr + (head * SHARE + i) * SIZE + d, mixed.to(tl.float16))
        tl.atomic_xchg(counter_ptr + head, 0)


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
        """heads of `size`, `cache` positions, a multiple of 64, of `batch` sequences B. kv_heads:
        of keys and values, as many where left out."""
        self.heads, self.size, self.cache = heads, size, cache
        self.kv_heads = kv_heads or heads
        self._overlap = overlap
        self._launch = {"launch_pdl": True} if overlap else {}
        self._partial = torch.empty(batch * heads * (cache // TILE) * (size + 2), device=device)
        self._counter = torch.zeros(batch * heads, dtype=torch.int32, device=device)

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
            num_warps=16,
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
        _attend_kernel[(self.kv_heads, self.cache // TILE, len(qkv))](
            qkv,
            keys,
            values,
            cosine,
            sine,
            place,
            self._partial,
            self._counter,
            out,
            CACHE=self.cache,
            HEADS=self.kv_heads,
            SHARE=self.heads // self.kv_heads,
            SIZE=self.size,
            POSITIONS=TILE,
            OVERLAP=self._overlap,
            num_warps=4,
            **self._launch,
        )
        return out
