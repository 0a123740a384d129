"""Which columns of a linear stay in 16 bits (OWQ, arXiv 2306.02272, section 3).

Those that rounding costs most: the k columns of the largest H_jj |w_j - round(w_j)|^2, rounded to
3 bits on the min-max grid of their group. What becomes of them is in `quant/outliers.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitmill.quant.codes import group_slices
from bitmill.quant.grid import ClipSettings, clip_search, nearest_codes, values
from bitmill.quant.outliers import Fitted
from bitmill.quant.rewrites import Rewrite
from bitmill.runtime.ranks import SINGLE, Ranks

RANKED_BITS = 3
"""Width at which rounding is tried to rank columns."""
DAMPING = 0.005
"""Of H_OO, as a share of the mean of diag H."""


@dataclass(frozen=True, eq=False)
class OutlierColumns:
    """The transform of linears with as many outlier columns as the map says, by full name; those
    that are fitted together have one number."""

    counts: Mapping[str, int]

    def fit(
        self, weights: Mapping[str, Tensor], H: Tensor | None, ranks: Ranks
    ) -> Mapping[str, Rewrite]:
        """The same columns of all linears that are given; nothing where the map keeps none."""
        count = self.counts.get(next(iter(weights)), 0)
        if not count or H is None:
            return {}
        found = chosen_columns(weights, H, count, ranks)
        return {name: Fitted(*found, W) for name, W in weights.items()}

    def alike(self, name: str) -> int:
        """Linears that read one input are solved together where this is the same."""
        return self.counts.get(name, 0)


def chosen_columns(
    weights: Mapping[str, Tensor], H: Tensor, count: int, ranks: Ranks = SINGLE
) -> tuple[Tensor, Tensor, Tensor]:
    """The outlier columns i64 [k] of linears f32 [n, K] that read one input, the weakest first,
    P f32 [K, k] and H_OO^-1 f32 [k, k]. H: f32 [K, K]. ranks: each has other rows."""
    energy, clip = H.diagonal(), ClipSettings.min_max()
    errors = torch.zeros_like(energy, dtype=torch.float64)
    for W in weights.values():
        for _, part in group_slices(W.shape[1]):
            block = W[:, part].contiguous()
            grid = clip_search(block, RANKED_BITS, energy[part], settings=clip)
            rounded = values(nearest_codes(block, grid, RANKED_BITS), grid)
            errors[part] += (block - rounded).double().square().sum(0)
    ranks.all_reduce(errors)
    columns = torch.argsort(errors * energy.double(), descending=True, stable=True)[:count]
    own = H[columns][:, columns].double()
    own.diagonal().add_(DAMPING * energy.double().mean().clamp_min(1e-30))
    inverse = torch.linalg.inv(own)
    shares = (H[:, columns].double() @ inverse).float()
    shares[columns] = torch.eye(count, device=H.device)
    return columns, shares, inverse.float()
