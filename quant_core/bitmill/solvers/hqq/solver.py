"""Half-quadratic quantization: grids that suit the weights, whatever the inputs are.

    minimize  sum_j |w_j - s (q_j - z)|^p         over s and z of a row's group, q the nearest codes

(Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", Mobius Labs 2023.)
The loss is not quadratic; with one more variable per weight it becomes so, and both are found in
turn (Geman and Reynolds, IEEE TPAMI 14(3), 1992):

    u_j <- |r_j|^(p-2),  r = w - s v,  v = q - z           how much each weight counts
    s   <- sum_j u_j w_j v_j / sum_j u_j v_j^2             least squares

The publication takes p = 0.7, keeps the min-max scale and moves a real zero point. Stored zero
points are integers here, so scales move instead: from ranges shrunk to 0.3 of themselves, with the
zero points on either side too; the best grid seen is taken. With free scales a small p cuts
outliers off. No statistics, no calibration.
"""

from __future__ import annotations

from collections.abc import MutableSequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitmill.quant.codes import LinearCodes, group_slices
from bitmill.quant.grid import (
    FP16_MAX,
    ONE_BIT_ZERO_STEPS,
    Grid,
    chunk_elements,
    clip_search,
    legal_candidates,
    max_code,
    nearest_codes,
    pick,
)
from bitmill.runtime.ranks import Ranks
from bitmill.solvers.hqq.settings import HQQ
from bitmill.solvers.solver import Linear, Solved

LEAST = 1e-3
"""Residuals below it, in steps of the grid, count as so much."""
SHRINKS = 12
ZERO_STEPS = (-1, 0, 1)
"""Starting grids: so many ranges from 1 down to 0.3, each with these steps of the zero point."""


@dataclass(frozen=True)
class HqqSolver:
    """HQQ as a solver (`solvers/solver.py`)."""

    norm: float
    iterations: int

    @classmethod
    def of(cls, settings: HQQ) -> HqqSolver:
        """The solver of a method's settings."""
        return cls(settings.norm, settings.iterations)

    def solve(self, linears: MutableSequence[Linear], H: Tensor | None, ranks: Ranks) -> Solved:
        """Errors are those of the weights themselves."""
        found = [self.quantize(one.W, one.widths) for one in linears]
        errors = []
        for one, codes in zip(linears, found, strict=True):
            before, after = (
                R.square().sum(dtype=torch.float64) for R in (one.W, one.W - codes.values())
            )
            errors.append(torch.stack([before, after, after]))
        weights = [codes.finish() for codes in found]
        return Solved(weights, [one.result() for one in linears], torch.stack(errors))

    def quantize(self, W: Tensor, widths: tuple[int, ...]) -> LinearCodes:
        """Codes of W f32 [N, K] in packed order."""
        codes, grids = [], []
        for group, part in group_slices(W.shape[1]):
            block, width = W[:, part].contiguous(), widths[group]
            start = starting_grids(block, width)
            rows = max(1, chunk_elements(W.device) // (start.scale.shape[1] * block.shape[1]))
            fitted = [
                self.fit(block[i : i + rows], Grid(*(one[i : i + rows] for one in start)), width)
                for i in range(0, len(block), rows)
            ]
            grid = Grid(*(torch.cat(parts) for parts in zip(*fitted, strict=True)))
            codes.append(nearest_codes(block, grid, width))
            grids.append(grid)
        return LinearCodes.join(codes, grids, widths)

    def fit(self, W: Tensor, start: Grid, width: int) -> Grid:
        """The best grid [N] for W f32 [N, C] that the iterations reach from grids [N, P]."""
        w, zero, scale = W[:, None], start.zero[..., None], start.scale
        best, least = scale, torch.full_like(scale, torch.inf)
        for iteration in range(self.iterations + 1):
            step = scale[..., None]
            inverse = torch.where(step > 0, 1 / step, 0.0)
            v = (w * inverse + zero).round().clamp_(0, max_code(width)) - zero
            residual = w - step * v
            loss = residual.abs().pow(self.norm).sum(-1)
            best, least = torch.where(loss < least, scale, best), torch.minimum(loss, least)
            if iteration == self.iterations:
                break
            counts = (residual * inverse).abs_().clamp_(min=LEAST).pow_(self.norm - 2) * v
            fitted = (counts * w).sum(-1) / (counts * v).sum(-1)
            rounded = fitted.clamp(max=FP16_MAX).half().float()
            scale = torch.where((rounded > 0) & (scale > 0), rounded, scale)
        return pick(Grid(best, start.zero), least)


def starting_grids(W: Tensor, width: int) -> Grid:
    """Scales and zeros f32 [N, P] for W f32 [N, C]."""
    shares = torch.linspace(1.0, 0.3, SHRINKS, device=W.device)
    steps = torch.tensor(ZERO_STEPS, dtype=torch.float32, device=W.device)
    if width == 1:  # two levels need not include 0, so ranges say little
        middle, steps = clip_search(W, 1), steps / ONE_BIT_ZERO_STEPS
        widest, zero = 1.5 * middle.scale, middle.zero
    else:
        low, high = W.amin(1).clamp(max=0.0), W.amax(1).clamp(min=0.0)
        widest = (high - low) / max_code(width)
        zero = torch.where(widest > 0, -low / widest, 0.0)
    scale = (widest[:, None, None] * shares).expand(-1, len(steps), -1).flatten(1)
    zeros = (zero[:, None, None] + steps[:, None]).expand(-1, -1, len(shares)).flatten(1)
    return legal_candidates(scale, zeros, width)
