"""AWQ: scales of input channels that make rounding hurt the outputs less.

    s = a^r / m^(1-r),   r the one of a grid of least  sum over linears of tr(R H R^T)
    R = W - Q(W diag(s)) diag(s)^-1

a [K] is the size of each input channel, m [K] that of its weights: the mean over rows of |w| over
the largest |w| of its row and group. (Lin et al., "AWQ", arXiv 2306.00978, sections 3.2 and 4; the
division by m as its code has it.) Here a is the root mean square, which H has on its diagonal, and
the error is that of all linears that read the input, on some of their rows. Q rounds to grids of
the widths that groups will have, clipped as methods clip them: what suits min-max grids helps less
behind a clip search. No scales at all are tried too, in the end with the whole search.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from bitmill.quant.codes import group_slices, row_errors
from bitmill.quant.grid import ClipSettings, clip_search, nearest_codes, values
from bitmill.runtime.ranks import Ranks
from bitmill.transforms.awq.settings import AWQ
from bitmill.transforms.channels import ChannelInputs, centred, relative

SHORT = ClipSettings(0.4, 8, zero_offsets=(), least_squares=1)
"""A short search of grids."""
ROWS = 256
"""Of each linear, evenly spaced, about so many are rounded on trial."""


class AwqScaling:
    """AWQ as a `ChannelScaling` (`transforms/transform.py`)."""

    def __init__(self, settings: AWQ) -> None:
        self.settings = settings

    def scales(
        self,
        weights: Mapping[str, Tensor],
        widths: Mapping[str, tuple[int, ...]],
        inputs: ChannelInputs,
        ranks: Ranks,
    ) -> Tensor:
        """See `ChannelScaling`."""
        H = inputs.H
        none = torch.ones(len(H), device=H.device)
        best, least = none, rounding_error(weights, widths, H, none)
        for scales in self._candidates(weights, H):
            error = rounding_error(weights, widths, H, scales)
            best = torch.where(error < least, scales, best)
            least = torch.minimum(error, least)
        with_none, with_best = (
            rounding_error(weights, widths, H, scales, ClipSettings()) for scales in (none, best)
        )
        best = torch.where(with_best < with_none, best, none)
        ranks.share(best, 0)
        return best

    def _candidates(self, weights: Mapping[str, Tensor], H: Tensor) -> Iterator[Tensor]:
        inputs = relative(H.diagonal().sqrt())
        sizes = relative(channel_sizes(list(weights.values())))
        for i in range(self.settings.steps + 1):
            r = i / self.settings.steps
            yield centred(inputs**r / sizes ** (1 - r))


def channel_sizes(matrices: list[Tensor]) -> Tensor:
    """m f32 [K] of matrices f32 [N_i, K]."""
    total = torch.zeros_like(matrices[0][0])
    for W in matrices:
        for _, part in group_slices(W.shape[1]):
            block = W[:, part].abs()
            largest = block.amax(1, keepdim=True)
            total[part] += torch.where(largest > 0, block / largest, 0.0).sum(0)
    return total / sum(map(len, matrices))


def rounding_error(
    weights: Mapping[str, Tensor],
    widths: Mapping[str, tuple[int, ...]],
    H: Tensor,
    scales: Tensor,
    clip: ClipSettings = SHORT,
) -> Tensor:
    """sum of tr(R H R^T) of weights f32 [N, K] rounded after scaling, f64 [], from some rows."""
    total = torch.zeros((), dtype=torch.float64, device=H.device)
    weight = H.diagonal() / scales.square()
    for name, W in weights.items():
        rows = W[:: max(1, len(W) // ROWS)]
        residual = rows - rounded(rows * scales, widths[name], weight, clip) / scales
        total += row_errors(residual, H).sum() * (len(W) / len(rows))
    return total


def rounded(W: Tensor, widths: tuple[int, ...], weight: Tensor, clip: ClipSettings) -> Tensor:
    """W f32 [N, K] on clipped grids of its groups; weight f32 [K] of the columns' errors."""
    parts = []
    for group, columns in group_slices(W.shape[1]):
        block = W[:, columns].contiguous()
        grid = clip_search(block, widths[group], weight[columns], settings=clip)
        parts.append(values(nearest_codes(block, grid, widths[group]), grid))
    return torch.cat(parts, 1)
