"""OmniQuant's learnable weight clipping with a bit width per group, as in SliM-LLM+.

    hi = sigmoid(u) max(w, 0),  lo = sigmoid(l) min(w, 0)        u, l start at 4
    s  = (hi - lo) / (2^b - 1),  z = round(-lo / s),  q = clamp(round(w / s + z), 0, 2^b - 1)

(arXiv 2308.13137, equation 2; group-wise widths: arXiv 2405.14917, section 3.3.) Only u and l are
learned, one of each per output row and group; weights are never moved, so this is the weakest of
the three modes and the published one. Two defects of the published code are mended: the rounding
of z passes its gradient on, and z is kept within 0..2^b - 1.

Width 1 has the two levels m - a and m + a with m the mean and a = 2 sigmoid(u) mean |w - m|,
started at u = 0, stored as s = 2a and z = 1/2 - m/s in eighths. The published code drops m when it
restores the weights and starts at 1.48 times the best a.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bitmill.quant.tensors import QuantizedWeight
from bitmill.refinement.omniquant.rounding import straight_half, straight_round, straight_zero
from bitmill.refinement.omniquant.rows import BlockRows

START = 4.0
"""Where u and l start: sigmoid(4) = 0.982 of the range is kept."""


class LearnedClipping(nn.Module):
    """Parameters of one block: upper and lower f32 [R, 1], before the sigmoid."""

    def __init__(self, rows: BlockRows, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.rows = rows
        self.weight = rows.of_weights(weights)
        self.high = self.weight.amax(1, keepdim=True).clamp(min=0.0)
        self.low = self.weight.amin(1, keepdim=True).clamp(max=0.0)
        self.mean = self.weight.sum(1, keepdim=True) / rows.columns
        distance = (self.weight - self.mean).abs()
        if rows.valid is not None:
            distance = distance * rows.valid
        self.spread = distance.sum(1, keepdim=True) / rows.columns
        start = torch.where(rows.one_bit, 0.0, START)
        self.upper = nn.Parameter(start.clone())
        self.lower = nn.Parameter(start.clone())

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point f32 [R, 1], both storable, differentiable."""
        share = torch.sigmoid(self.upper)
        high, low = share * self.high, torch.sigmoid(self.lower) * self.low
        # Of dropped groups the largest code is 0, and so are step and scale.
        step = torch.where(
            self.rows.largest > 0, (high - low) / self.rows.largest.clamp(min=1.0), 0.0
        )
        step = torch.where(self.rows.one_bit, 4 * share * self.spread, step)
        scale = straight_half(step)
        safe = torch.where(scale > 0, scale, 1.0)
        zero = torch.where(self.rows.one_bit, 0.5 - self.mean / safe, -low / safe)
        return scale, straight_zero(zero, self.rows)

    def codes(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Codes f32 [R, 128] of the weights on a grid, differentiable."""
        exact = self.weight / torch.where(scale > 0, scale, 1.0)
        return torch.minimum(straight_round(exact + zero).clamp(min=0.0), self.rows.largest)

    def forward(self, dtype: torch.dtype) -> Tensor:
        """Weights [R, 128] in `dtype`, computed in f32 and cast once."""
        scale, zero = self.grid()
        return (scale * (self.codes(scale, zero) - zero)).to(dtype)

    @torch.no_grad()
    def export(self) -> dict[str, QuantizedWeight]:
        """What would be stored now, on the CPU."""
        scale, zero = self.grid()
        return self.rows.export(self.codes(scale, zero), scale, zero)
