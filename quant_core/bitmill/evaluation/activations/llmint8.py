"""Rule "llmint8", of LLM.int8() (arXiv 2208.07339, section 3): outliers of the inputs stay in 16
bits.

Input columns with a value of 6 or more in any of the tokens that are multiplied together are left
as they are; of the others each token has a symmetric grid of its own. There the weights of such
columns stay in 16 bits too; here weights are what the result has.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from bitmill.evaluation.activations.grids import symmetric_tokens
from bitmill.evaluation.activations.rule import LinearInputs

THRESHOLD = 6.0


class LLMInt8:
    """See `ActivationRule`."""

    title: ClassVar[str] = "LLM.int8()"
    observes: ClassVar[bool] = False

    def rounded(self, x: Tensor, bits: int, inputs: LinearInputs) -> Tensor:
        """See `ActivationRule`; the tokens of one call are multiplied together."""
        outlier = (x.abs() >= THRESHOLD).flatten(0, -2).any(0)
        return x.where(outlier, symmetric_tokens(x.masked_fill(outlier, 0.0), bits))
