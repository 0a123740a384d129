"""Circles of a group of columns, tile column by tile column, with feedback to those behind.

    for every 16 columns b, in order:  v_b = the circles of least |s (w_b / step - v)|^2,
                                       E_b = (w_b - step v_b) U_bb^-1,
                                       w_k -= E_b U_bk  for k > b

`encode_group` takes one launch a rate on a GPU (`group_cuda.py`); `encode_group_reference` is the
plain version, whose search is that of `encode_tiles`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from bitmill_kernels.backend import wants_reference
from bitmill_kernels.trellis import group_cuda
from bitmill_kernels.trellis.code import decode_tiles, in_sequence, tiled, untiled
from bitmill_kernels.trellis.encode import encode_tiles
from bitmill_kernels.trellis.layout import TILE

STRONGEST = 2.0
"""Emphasis of a row at most; one over it at least."""


class Feedback(NamedTuple):
    """U f32 [c, c] of the group's columns, and the inverses f32 [ceil(c / 16), 16, 16] of its tiles
    on the diagonal, filled up by ones."""

    upper: Tensor
    inverses: Tensor


class Encoded(NamedTuple):
    """Circles u8 [rows / 16, ceil(c / 16), 32 k] of each linear, and E f32 [M, c], 0 without
    feedback."""

    circles: list[Tensor]
    missed: Tensor


def encode_group(
    block: Tensor,
    step: Tensor,
    emphasis: Tensor,
    feedback: Feedback | None,
    rows: Sequence[slice],
    rates: Sequence[int],
) -> Encoded:
    """Circles for w f32 [M, c] of one group, M a multiple of 16.

    step: f32 [M], what values are multiplied by. emphasis: s f32 [M], what errors in units of
    steps are multiplied by before they are squared (`encode.py`); see `emphases`. feedback: None
    for none. rows: those of each linear, whole tiles; rates: of each.
    """
    if block.is_cuda and not wants_reference("auto") and group_cuda.available():
        return Encoded(*_on_device(block, step, emphasis, feedback, rows, rates))
    return encode_group_reference(block, step, emphasis, feedback, rows, rates)


def emphases(importance: Tensor) -> Tensor:
    """Emphasis f32 [M] of rows, M a multiple of 16, whose errors count by importance f32 [M].

    Rows r and r + 8 of a tile take turns in a circle, so they alone can give bits to each other:
    their product is 1, and their ratio at most 4. Halves of a word, as searches compute in them.
    """
    pairs = importance.float().view(-1, 2, TILE // 2)
    first, second = pairs.clamp(min=torch.finfo(torch.float32).tiny).unbind(1)
    ratio = (first.log() - second.log()).div(4).exp().clamp(1 / STRONGEST, STRONGEST)
    return torch.stack([ratio, 1 / ratio], 1).flatten().half().float()


def encode_group_reference(
    block: Tensor,
    step: Tensor,
    emphasis: Tensor,
    feedback: Feedback | None,
    rows: Sequence[slice],
    rates: Sequence[int],
) -> Encoded:
    """`encode_group` in plain torch."""
    block, inverse = block.clone(), torch.where(step > 0, 1 / step, 0.0)[:, None]
    missed = torch.zeros_like(block)
    found: list[list[Tensor]] = [[] for _ in rows]
    for start in range(0, block.shape[1], TILE):
        part = slice(start, min(start + TILE, block.shape[1]))
        width = part.stop - part.start
        target = functional.pad(block[:, part] * inverse, (0, TILE - width))
        values = torch.empty_like(target)
        for rate, alike in by_rate(rates).items():
            tiles = in_sequence(tiled(torch.cat([target[rows[i]] for i in alike])))
            counts = torch.cat([emphasis[rows[i]] for i in alike]).view(-1, TILE)
            new = encode_tiles(tiles.flatten(0, 1), rate, counts)
            decoded = untiled(decode_tiles(new, rate)[:, None]).float()
            sizes = [rows[i].stop - rows[i].start for i in alike]
            for i, mine in zip(alike, decoded.split(sizes), strict=True):
                values[rows[i]] = mine
            for i, mine in zip(alike, new.split([n // TILE for n in sizes]), strict=True):
                found[i].append(mine)
        if feedback is None:
            continue
        lost = block[:, part] - values[:, :width] * step[:, None]
        lost = lost @ feedback.inverses[start // TILE, :width, :width]
        missed[:, part] = lost
        block[:, part.stop :] -= lost @ feedback.upper[part, part.stop :]
    return Encoded([torch.stack(columns, 1) for columns in found], missed)


def by_rate(rates: Sequence[int]) -> dict[int, list[int]]:
    """The linears of each rate, by their numbers."""
    return {
        rate: [i for i, own in enumerate(rates) if own == rate] for rate in dict.fromkeys(rates)
    }


def _on_device(
    block: Tensor,
    step: Tensor,
    emphasis: Tensor,
    feedback: Feedback | None,
    rows: Sequence[slice],
    rates: Sequence[int],
) -> tuple[list[Tensor], Tensor]:
    """One launch for all linears of a rate, whose rows of tiles go by their numbers."""
    block, missed = block.clone(memory_format=torch.contiguous_format), torch.zeros_like(block)
    numbers = torch.arange(len(block) // TILE, dtype=torch.int32, device=block.device)
    tiles = [numbers[own.start // TILE : own.stop // TILE] for own in rows]
    found: dict[int, Tensor] = {}
    for rate, alike in by_rate(rates).items():
        mine = [tiles[i] for i in alike]
        circles = group_cuda.search(block, step, emphasis, feedback, missed, torch.cat(mine), rate)
        parts = circles.split([len(one) for one in mine])
        found |= {i: part.clone() for i, part in zip(alike, parts, strict=True)}
    return [found[i] for i in range(len(rows))], missed
