"""Round to nearest: every group takes its grid and each weight its nearest code.

    q = clamp(round(w / s + z), 0, 2^b - 1)

The floor that every other method is compared with. With a Hessian its diagonal weighs the clip
search; without one the columns weigh alike.
"""

from __future__ import annotations

from collections.abc import MutableSequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bitmill.config.methods import RTN
from bitmill.quant.codes import LinearCodes, group_slices, row_errors
from bitmill.quant.grid import (
    ClipSettings,
    Grid,
    clip_search,
    clip_search_groups,
    max_code,
    nearest_codes,
    relative_weights,
    round_scale,
)
from bitmill.runtime.ranks import Ranks
from bitmill.solvers.solver import Linear, Solved
from bitmill_kernels.backend import resolve_backend


@dataclass(frozen=True)
class RtnSolver:
    """Rounding as a solver (`solvers/solver.py`)."""

    clip: ClipSettings = field(default_factory=ClipSettings)

    @classmethod
    def of(cls, settings: RTN) -> RtnSolver:
        """The solver of a method's settings."""
        return cls(ClipSettings() if settings.clip_search else ClipSettings.min_max())

    def solve(self, linears: MutableSequence[Linear], H: Tensor | None, ranks: Ranks) -> Solved:
        """Nearest codes; without H errors are those of the weights themselves."""
        weight = None if H is None else H.diagonal()
        codes = [round_to_nearest(one.W, one.widths, weight, self.clip) for one in linears]
        errors = [_errors(one.W, own, H) for one, own in zip(linears, codes, strict=True)]
        weights = [own.finish() for own in codes]
        return Solved(weights, [one.result() for one in linears], torch.stack(errors))


def _errors(W: Tensor, codes: LinearCodes, H: Tensor | None) -> Tensor:
    """Of zeros and of the codes, which are stored as they are: f64 [3]."""
    metric = torch.eye(W.shape[1], device=W.device) if H is None else H
    zeros, rounded = (row_errors(R, metric).sum() for R in (W, W - codes.values()))
    return torch.stack([zeros, rounded, rounded])


def round_to_nearest(
    W: Tensor, widths: tuple[int, ...], weight: Tensor | None, clip: ClipSettings
) -> LinearCodes:
    """Nearest codes of W f32 [N, K] in packed order; weight f32 [K] weighs the clip search."""
    if resolve_backend("auto", W.device) == "triton":
        return _round_on_device(W, widths, weight, clip)
    codes, grids = [], []
    for group, part in group_slices(W.shape[1]):
        block = W[:, part].contiguous()
        h = None if weight is None else weight[part]
        grid = clip_search(block, widths[group], h, settings=clip)
        codes.append(nearest_codes(block, grid, widths[group]))
        grids.append(grid)
    return LinearCodes.join(codes, grids, widths)


def _round_on_device(
    W: Tensor, widths: tuple[int, ...], weight: Tensor | None, clip: ClipSettings
) -> LinearCodes:
    """All groups of two bits and more searched in one launch."""
    h = relative_weights(W.new_ones(W.shape[1]) if weight is None else weight)
    largest = torch.tensor([float(max_code(width)) for width in widths])
    largest = largest.to(W.device, non_blocking=True)
    found = clip_search_groups(W.T, largest[:, None].expand(-1, len(W)), h, clip)
    for group, part in group_slices(W.shape[1]):
        if widths[group] == 1:
            one = clip_search(W[:, part], 1, h[part], settings=clip)
            found.scale[group], found.zero[group] = one
    return LinearCodes.nearest(W, Grid(round_scale(found.scale), found.zero), widths)
