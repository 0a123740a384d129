"""Rotation of columns inside their groups, the same for every linear (`quant/rotation.py`)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from bitmill.config.transforms import Rotation as Settings
from bitmill.quant.rewrites import Rewrite
from bitmill.quant.rotation import Rotation
from bitmill.runtime.ranks import Ranks


class Rotations:
    """A transform (`transforms/transform.py`) that looks at nothing."""

    def __init__(self, settings: Settings) -> None:
        pass

    def fit(
        self, weights: Mapping[str, Tensor], H: Tensor | None, ranks: Ranks
    ) -> Mapping[str, Rewrite]:
        """The rotation."""
        return dict.fromkeys(weights, Rotation())
