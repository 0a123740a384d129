"""Rule "quik", of QUIK (arXiv 2310.09259, section 3): a fixed set of input columns stays in 16
bits.

Those are the columns whose weights are stored in 16 bits (outlier columns, `allocation.outliers`);
of the others each token has a min-max grid of its own. A linear without such columns has all of its
inputs rounded.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from bitmill.evaluation.activations.grids import rounded_between
from bitmill.evaluation.activations.rule import LinearInputs


class QUIK:
    """See `ActivationRule`."""

    title: ClassVar[str] = "QUIK"
    observes: ClassVar[bool] = False

    def rounded(self, x: Tensor, bits: int, inputs: LinearInputs) -> Tensor:
        """See `ActivationRule`."""
        outlier = torch.zeros(x.shape[-1], dtype=torch.bool, device=x.device)
        outlier[inputs.outliers.to(x.device)] = True
        values = x.float()
        least = values.masked_fill(outlier, torch.inf).amin(-1, keepdim=True)
        most = values.masked_fill(outlier, -torch.inf).amax(-1, keepdim=True)
        return x.where(outlier, rounded_between(x, least, most, bits))
