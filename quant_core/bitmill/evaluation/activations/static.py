"""Rule "static": one grid for all tokens, from the least to the largest value in calibration.

A linear that no calibration window reached, as an expert may be, has a grid for each token.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from bitmill.evaluation.activations.grids import rounded_between, rounded_tokens
from bitmill.evaluation.activations.rule import LinearInputs


class Static:
    """See `ActivationRule`."""

    observes: ClassVar[bool] = True

    def rounded(self, x: Tensor, bits: int, inputs: LinearInputs) -> Tensor:
        """See `ActivationRule`."""
        if inputs.least is None or inputs.most is None:
            return rounded_tokens(x, bits)
        return rounded_between(x, inputs.least.to(x.device), inputs.most.to(x.device), bits)
