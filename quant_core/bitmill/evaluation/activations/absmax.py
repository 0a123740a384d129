"""Rule "absmax": each token on a grid around 0, as engines round for products of int8."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from bitmill.evaluation.activations.grids import symmetric_tokens
from bitmill.evaluation.activations.rule import LinearInputs


class AbsMax:
    """See `ActivationRule`."""

    observes: ClassVar[bool] = False

    def rounded(self, x: Tensor, bits: int, inputs: LinearInputs) -> Tensor:
        """See `ActivationRule`."""
        return symmetric_tokens(x, bits)
