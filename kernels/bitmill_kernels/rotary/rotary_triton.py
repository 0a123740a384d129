"""The turn of `rotary.py` as one Triton kernel, for queries and keys in one launch.

A program takes one token and some heads, of the queries or of the keys: it loads the token's
angles once, and both halves of every head side by side. Offsets are 64-bit. A tensor travels with
its strides: (pointer, of the batch, of the head, of the token), angles without that of the head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

VALUES = 1024  # of each half, that a program takes


@triton.jit
def _rotary_kernel(
    q: tl.tuple,
    q_out: tl.tuple,
    k: tl.tuple,
    k_out: tl.tuple,
    cos: tl.tuple,
    sin: tl.tuple,
    T: tl.tensor,
    q_heads: tl.tensor,
    k_heads: tl.tensor,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    REST_COLUMNS: tl.constexpr,
    BACK: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    batch, token = (row // T).to(tl.int64), (row % T).to(tl.int64)
    cos_1, cos_2 = _angles(cos, batch, token, HALF, COLUMNS)
    sin_1, sin_2 = _angles(sin, batch, token, HALF, COLUMNS)
    if BACK:
        sin_1, sin_2 = -sin_2, -sin_1
    turn = (cos_1, cos_2, sin_1, sin_2)
    tile = tl.program_id(1)
    q_tiles = tl.cdiv(q_heads, HEADS)
    if tile < q_tiles:
        head = tile * HEADS + tl.arange(0, HEADS)[:, None]
        _turn(q, q_out, batch, token, head, q_heads, turn, HALF, REST, COLUMNS, REST_COLUMNS)
    else:
        head = (tile - q_tiles) * HEADS + tl.arange(0, HEADS)[:, None]
        _turn(k, k_out, batch, token, head, k_heads, turn, HALF, REST, COLUMNS, REST_COLUMNS)


@triton.jit
def _angles(
    x: tl.tuple, batch: tl.tensor, token: tl.tensor, HALF: tl.constexpr, COLUMNS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Both halves of a token's cosines or sines, f32 [1, COLUMNS]."""
    column = tl.arange(0, COLUMNS)[None, :]
    start = x[0] + batch * x[1] + token * x[2] + column
    one = tl.load(start, mask=column < HALF)
    two = tl.load(start + HALF, mask=column < HALF)
    return one.to(tl.float32), two.to(tl.float32)


@triton.jit
def _turn(
    x: tl.tuple,
    y: tl.tuple,
    batch: tl.tensor,
    token: tl.tensor,
    head: tl.tensor,
    heads: tl.tensor,
    turn: tl.tuple,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    COLUMNS: tl.constexpr,
    REST_COLUMNS: tl.constexpr,
) -> None:
    """Those of the heads [HEADS, 1] that there are."""
    source = x[0] + batch * x[1] + token * x[3] + head.to(tl.int64) * x[2]
    target = y[0] + batch * y[1] + token * y[3] + head.to(tl.int64) * y[2]
    column = tl.arange(0, COLUMNS)[None, :]
    live = (head < heads) & (column < HALF)
    one = tl.load(source + column, mask=live).to(tl.float32)
    two = tl.load(source + HALF + column, mask=live).to(tl.float32)
    tl.store(target + column, one * turn[0] - two * turn[2], mask=live)
    tl.store(target + HALF + column, two * turn[1] + one * turn[3], mask=live)
    if REST > 0:
        rest = tl.arange(0, REST_COLUMNS)[None, :]
        live = (head < heads) & (rest < REST)
        kept = tl.load(source + 2 * HALF + rest, mask=live)
        tl.store(target + 2 * HALF + rest, kept, mask=live)


def rotate_triton(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool
) -> tuple[Tensor, Tensor]:
    """q [B, H, T, d], k [B, Hk, T, d], turned by cos, sin [B or 1, T, r], or `back`."""
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    q_out, k_out = _empty_like(q), _empty_like(k)
    B, _, T, d = q.shape
    q_heads, k_heads, turned = q.shape[1], k.shape[1], cos.shape[2]
    columns = triton.next_power_of_2(turned // 2)
    heads = max(1, min(VALUES // columns, triton.next_power_of_2(max(q_heads, k_heads))))
    tiles = triton.cdiv(q_heads, heads) + triton.cdiv(k_heads, heads)
    if B * T and tiles:
        _rotary_kernel[(B * T, tiles)](
            *((x, *x.stride()[:3]) for x in (q, q_out, k, k_out)),
            *((x, *x.expand(B, T, turned).stride()[:2]) for x in (cos, sin)),
            T,
            q_heads,
            k_heads,
            HALF=turned // 2,
            REST=d - turned,
            HEADS=heads,
            COLUMNS=columns,
            REST_COLUMNS=triton.next_power_of_2(d - turned),
            BACK=back,
            num_warps=4,
        )
    return q_out, k_out


def _empty_like(x: Tensor) -> Tensor:
    """In the memory order of x, which may overlap itself, where that leaves rows in one piece."""
    y = torch.empty_like(x)
    return y if y.stride(-1) == 1 else torch.empty(x.shape, dtype=x.dtype, device=x.device)
