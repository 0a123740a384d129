"""SmoothQuant: scales of input channels that leave activations fewer outliers.

    s_j = max |x_j|^alpha / max |w_j|^(1 - alpha)

The first largest over calibration tokens, the second over rows of all linears that read the input.
(Xiao et al., "SmoothQuant", arXiv 2211.10438, equation 4.)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bitmill.runtime.ranks import Ranks
from bitmill.transforms.channels import ChannelInputs, centred, relative
from bitmill.transforms.smoothquant.settings import SmoothQuant


class SmoothScaling:
    """SmoothQuant as a `ChannelScaling` (`transforms/transform.py`)."""

    def __init__(self, settings: SmoothQuant) -> None:
        self.settings = settings

    def scales(
        self,
        weights: Mapping[str, Tensor],
        widths: Mapping[str, tuple[int, ...]],
        inputs: ChannelInputs,
        ranks: Ranks,
    ) -> Tensor:
        """See `ChannelScaling`."""
        largest = torch.stack([W.abs().amax(0) for W in weights.values()]).amax(0)
        alpha = self.settings.alpha
        return centred(relative(inputs.largest) ** alpha / relative(largest) ** (1 - alpha))
