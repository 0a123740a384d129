"""The trellis code: weights as a fixed function of 16 bits each of a stream.

A tile of 16 rows and 16 columns at rate k is a circle of 256 k bits, 32 k bytes. Its bits from
B t on, 16 of them, are state t (bitshift trellis with tail-biting, QTIP, arXiv 2406.11235):

    k <= 4:  B = 2k, 128 states, two values each      v = f(halves of h) + f(halves of h reversed)
    k >= 5:  B = k,  256 states, one value each       v = f(lower half of h) + f(upper half of h)
    h = state * 0x962cae47 mod 2^32, reversed byte by byte;  f(u) = (u & 0x8fff) ^ 0x3b60 as fp16

Sums are rounded to fp16. Bit i of a circle is bit i % 8 of byte i // 8. Values follow each other as
the fragments of a 16x16 matrix instruction lie in the registers of 32 lanes (`POSITIONS`), so a
lane reads one piece of the circle. Why this code: benchmarks/results/trellis-codes.md.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from bitmill_kernels.trellis.layout import FLIPPED, KEPT, MULTIPLIER, STATE_BITS, TILE

DEVIATION = {
    1: 1.391,
    2: 1.231,
    3: 1.163,
    4: 1.104,
    5: 1.074,
    6: 1.019,
    7: 0.967,
    8: 0.954,
}
"""Standard deviation of the Gaussian numbers that the code of a rate fits best."""

DISTORTION = {
    1: 0.2701,
    2: 0.0705,
    3: 0.01844,
    4: 0.00500,
    5: 0.00122,
    6: 3.25e-4,
    7: 8.9e-5,
    8: 2.8e-5,
}
"""Mean squared error over the variance there (benchmarks/results/trellis-distortion.md)."""


def values_per_state(rate: int) -> int:
    """V of a rate."""
    return 2 if rate <= 4 else 1


def state_values(states: Tensor, rate: int) -> Tensor:
    """Values f16 [..., V] of states [...], integers of 0 to 65535."""
    h = states.long() * MULTIPLIER & 0xFFFFFFFF
    lower, upper = h & 0xFFFF, h >> 16
    if values_per_state(rate) == 1:
        return (_half(lower) + _half(upper)).half()[..., None]
    pairs = ((lower, _reversed(upper)), (upper, _reversed(lower)))
    return torch.stack([(_half(one) + _half(other)).half() for one, other in pairs], -1)


def _half(u: Tensor) -> Tensor:
    """f of 16 bits each, f32."""
    bits = (u & KEPT) ^ FLIPPED
    return (
        torch.where(bits > 0x7FFF, bits - 0x10000, bits).to(torch.int16).view(torch.float16).float()
    )


def _reversed(u: Tensor) -> Tensor:
    """The two bytes of 16 bits, changed over."""
    return (u & 0xFF) << 8 | u >> 8


@cache
def table(rate: int, device: torch.device) -> Tensor:
    """Values f32 [65536, V] of all states."""
    return state_values(torch.arange(1 << STATE_BITS, device=device), rate).float()


@cache
def positions(device: torch.device) -> Tensor:
    """Place in the tile (16 * row + column) of every value of the circle, i64 [256].

    Value 8 lane + 2 register + half of a circle stands where that half of that register of that
    lane stands in the left operand of mma.m16n8k16.
    """
    i = torch.arange(TILE * TILE, device=device)
    lane, register, half = i // 8, i // 2 % 4, i % 2
    row = lane // 4 + 8 * (register % 2)
    place: Tensor = TILE * row + 2 * (lane % 4) + 8 * (register // 2) + half
    return place


def row_of_values(device: torch.device) -> Tensor:
    """Row in the tile of every value of the circle, i64 [256]."""
    return positions(device) // TILE


def states(circles: Tensor, rate: int) -> Tensor:
    """All states i64 [T, 256 / V] of circles u8 [T, 32 rate]."""
    step = rate * values_per_state(rate)
    first = torch.arange(0, 8 * circles.shape[-1], step, device=circles.device)
    byte, around = first // 8, circles.shape[-1]
    parts = [circles[..., (byte + i) % around].long() << 8 * i for i in range(3)]
    found: Tensor = (parts[0] | parts[1] | parts[2]) >> first % 8 & 0xFFFF
    return found


def decode_tiles(circles: Tensor, rate: int) -> Tensor:
    """Values f16 [T, 16, 16] of circles u8 [T, 32 rate]."""
    values = state_values(states(circles, rate), rate).flatten(-2)
    tiles = torch.empty_like(values)
    tiles[..., positions(circles.device)] = values
    return tiles.view(*circles.shape[:-1], TILE, TILE)


def to_circles(path: Tensor, rate: int) -> Tensor:
    """Circles u8 [T, 32 rate] of states [T, 256 / V] that follow each other around."""
    step = rate * values_per_state(rate)
    bits = path[..., None].long() >> torch.arange(step, device=path.device) & 1
    octets: Tensor = bits.flatten(-2).unflatten(-1, (-1, 8))
    return (octets << torch.arange(8, device=path.device)).sum(-1).to(torch.uint8)


def in_sequence(tiles: Tensor) -> Tensor:
    """Tiles [T, 16, 16] as rows [T, 256] in the sequence of the circle."""
    return tiles.flatten(-2)[..., positions(tiles.device)]


def tiled(W: Tensor) -> Tensor:
    """Tiles [R, C, 16, 16] of W [16 R, 16 C]."""
    tiles: Tensor = W.unflatten(1, (-1, TILE)).unflatten(0, (-1, TILE)).transpose(1, 2)
    return tiles


def untiled(tiles: Tensor) -> Tensor:
    """W [16 R, 16 C] of tiles [R, C, 16, 16]."""
    return tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)
