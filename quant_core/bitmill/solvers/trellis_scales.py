"""Scales of rows and groups for trellis codes: those by which the code is expected to lose least.

    sum over rows n and groups g of  q_n m_g (r_n s_g)^2 f(sigma_ng / (r_n s_g))

sigma is the deviation of a row's weights in a group, f the code's expected error for numbers of a
deviation (`bitmill_kernels/trellis/errors.py`), q_n what squared errors of a row count, and m_g
what feedback makes of errors in a group. Where the sizes of weights are a product of rows and
groups, scales by size are the best. Where one row has one group far above its others, its values
would end beyond the code's largest there, so its scale or that of the group has to be larger.

sigma^4 is a third of the mean fourth power, as of Gaussian numbers, for what lies beyond the code's
largest value decides. One weight far above all others becomes numbers of one magnitude in the
rotation of its group: they have no tails, and squares would take them to be larger than they count.

Rows' scales are fitted before the solver's loop; a group's is fitted when the loop reaches it, to
the weights as they are by then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from bitmill.quant.codes import group_slices
from bitmill.quant.grid import FP16_MAX
from bitmill.runtime.ranks import Ranks
from bitmill_kernels.trellis.errors import best_sizes, expected_errors

BALANCING = 4
"""Rounds in which sizes of rows and groups are fitted to each other."""
ROUNDS = 3
"""Rounds in which scales of rows and groups are then chosen by what is lost."""
ROW_RATIOS = tuple(sorted((step / 10 for step in range(-5, 17)), key=abs))
GROUP_RATIOS = tuple(sorted((step / 20 for step in range(-8, 17)), key=abs))
"""Multiples of a scale that are tried, as natural logarithms; of equals the first is taken."""
AT_ONCE = 1 << 22
"""Errors that are worked out at a time."""

_TINY = torch.finfo(torch.float32).tiny


class Sized(NamedTuple):
    """Rows of one linear.

    sizes: sigma f32 [N, G]. importance: q f32 [N]; None where rows count alike in units of their
    scales. rates: of the groups.
    """

    sizes: Tensor
    importance: Tensor | None
    rates: Sequence[int]

    def counts(self, rows: Tensor) -> Tensor:
        """q_n r_n^2, f32 [N], of row scales r f32 [N]; 0 where these are."""
        return (rows > 0).float() if self.importance is None else self.importance * rows**2


def sizes_of(W: Tensor) -> Tensor:
    """Deviations f32 [N, G] of the rows of W f32 [N, K] in their groups, by fourth powers."""
    parts = [W[:, part].square().square().mean(1) for _, part in group_slices(W.shape[1])]
    return torch.stack(parts, 1).div(3).pow(0.25)


def row_scales(linears: Sequence[Sized], carried: Tensor, ranks: Ranks) -> list[Tensor]:
    """r f16 [N] of each; the s_g that belong to them, zeros left out, have a geometric mean of 1.

    carried: m f32 [G]. ranks: those with other rows of the same linears.
    """
    rows = _balanced([one.sizes for one in linears], ranks)
    for _ in range(ROUNDS):
        steps = group_scales(linears, rows, ranks)
        rows = [_best_rows(*each, carried) for each in zip(linears, rows, steps, strict=True)]
    steps = group_scales(linears, rows, ranks)
    return [stored(r * _geometric_mean(s)) for r, s in zip(rows, steps, strict=True)]


def group_scales(linears: Sequence[Sized], rows: Sequence[Tensor], ranks: Ranks) -> list[Tensor]:
    """s f32 [G] of each, for row scales r f32 [N], which are 0 where the weights of a row are."""
    relative = [
        torch.where(r[:, None] > 0, one.sizes / r[:, None].clamp(min=_TINY), 0.0)
        for one, r in zip(linears, rows, strict=True)
    ]
    powers = [size.square().sum(0, dtype=torch.float64) for size in relative]
    live = [(r > 0).sum(dtype=torch.float64) for r in rows]
    ranks.all_reduce(*powers, *live)
    first = [
        (power / count.clamp(min=1)).sqrt().float() / best_sizes(one.rates, power.device)
        for one, power, count in zip(linears, powers, live, strict=True)
    ]
    losses = []
    for one, size, r, start in zip(linears, relative, rows, first, strict=True):
        ratios = _multiples(GROUP_RATIOS, size.device)
        loss = torch.zeros(len(ratios), len(start), dtype=torch.float64, device=size.device)
        counts = one.counts(r).split(_rows_at_once(size, ratios))
        parts = _errors(size, start.expand_as(size), ratios, one.rates)
        for own, errors in zip(counts, parts, strict=True):
            loss += (errors * own[:, None]).sum(1, dtype=torch.float64)
        losses.append(loss)
    ranks.all_reduce(*losses)
    return [
        start * _multiples(GROUP_RATIOS, start.device)[loss.argmin(0)]
        for start, loss in zip(first, losses, strict=True)
    ]


def stored(scales: Tensor) -> Tensor:
    """As checkpoints keep them, f16."""
    return scales.clamp(max=FP16_MAX).to(torch.float16)


def _balanced(sizes: Sequence[Tensor], ranks: Ranks) -> list[Tensor]:
    """r f32 [N] of the best product r_n s_g for each sigma [N, G]; 0 for rows of zeros."""
    powers = [size.square() for size in sizes]
    rows = [power.mean(1).clamp(min=_TINY) for power in powers]
    for _ in range(BALANCING):
        sums = [
            (power / own[:, None]).sum(0, dtype=torch.float64)
            for power, own in zip(powers, rows, strict=True)
        ]
        ranks.all_reduce(*sums)
        for i, (power, total) in enumerate(zip(powers, sums, strict=True)):
            groups = total.float() / _geometric_mean(total.float())
            relative = torch.where(groups > 0, power / groups.clamp(min=_TINY), 0.0)
            rows[i] = (relative.sum(1) / (groups > 0).sum().clamp(min=1)).clamp(min=_TINY)
    return [
        torch.where(size.amax(1) > 0, own.sqrt(), 0.0)
        for size, own in zip(sizes, rows, strict=True)
    ]


def _best_rows(one: Sized, rows: Tensor, steps: Tensor, carried: Tensor) -> Tensor:
    """Of each row the best multiple of r f32 [N], beside s f32 [G]."""
    ratios = _multiples(ROW_RATIOS, rows.device)
    parts = _errors(one.sizes, rows[:, None] * steps, ratios, one.rates)
    losses = torch.cat([(own * carried).sum(2, dtype=torch.float64) for own in parts], 1)
    return rows * ratios[losses.argmin(0)]


def _errors(sizes: Tensor, steps: Tensor, ratios: Tensor, rates: Sequence[int]) -> Iterator[Tensor]:
    """Squared errors f32 [C, n, G] at C multiples of steps f32 [N, G], some rows at a time."""
    count = _rows_at_once(sizes, ratios)
    for size, step in zip(sizes.split(count), steps.split(count), strict=True):
        tried = step * ratios[:, None, None]
        yield tried.square() * expected_errors(size / tried.clamp(min=_TINY), rates)


def _rows_at_once(sizes: Tensor, ratios: Tensor) -> int:
    return max(1, AT_ONCE // (len(ratios) * sizes.shape[1]))


@cache
def _multiples(logarithms: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(logarithms, device=device).exp()


def _geometric_mean(values: Tensor) -> Tensor:
    """Of those that are not zero, f32 []; 1 where all are."""
    live = values > 0
    logarithms = torch.where(live, values.clamp(min=_TINY).log(), 0.0)
    return (logarithms.sum() / live.sum().clamp(min=1)).exp()
