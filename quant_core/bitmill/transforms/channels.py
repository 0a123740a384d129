"""What scales of input channels are found from, and their bounds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST = 1e-4
"""Of sizes, as a share of the largest, so that a dead channel takes no endless scale."""


@dataclass(frozen=True, eq=False)
class ChannelInputs:
    """What is known of an input x. H: f32 [K, K], mean x x^T; largest: f32 [K], max |x|."""

    H: Tensor
    largest: Tensor

    def ordered(self, order: Tensor) -> ChannelInputs:
        """In other columns, i64 [K]."""
        return ChannelInputs(self.H[order][:, order], self.largest[order])


def relative(sizes: Tensor) -> Tensor:
    """Sizes f32 [K] >= 0 as shares of the largest, none below `SMALLEST`; 1 where all are 0."""
    largest = sizes.amax()
    shares = torch.where(largest > 0, sizes / largest, torch.ones_like(sizes))
    return shares.clamp(min=SMALLEST)


def centred(scales: Tensor) -> Tensor:
    """Scales f32 [K] with the smallest and the largest equally far from 1."""
    return scales / (scales.amax() * scales.amin()).sqrt()
