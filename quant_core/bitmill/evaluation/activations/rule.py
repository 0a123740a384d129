"""What rounds the inputs of linears otherwise than each token on a min-max grid of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor


@dataclass(frozen=True, eq=False)
class LinearInputs:
    """What is known of a linear's inputs.

    outliers: i64 [k], input columns whose weights are stored in 16 bits. least, most: of all values
    in the calibration windows, f32 [], where a rule observes them.
    """

    outliers: Tensor
    least: Tensor | None = None
    most: Tensor | None = None


class ActivationRule(Protocol):
    """A rule of `config.rounded.ACTIVATION_RULES`; made without arguments.

    observes: whether it wants ranges, for which the calibration windows are run first.
    """

    observes: ClassVar[bool]

    def rounded(self, x: Tensor, bits: int, inputs: LinearInputs) -> Tensor:
        """What x [..., T, K], inputs of one linear for T tokens, becomes; in its dtype."""
