"""Settings of transform "smoothquant". Torch-free."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from bitmill.config.bit_width_map import LinearShape
from bitmill.config.transforms import TransformConfig
from bitmill.io.safetensors import TensorInfo


class SmoothQuant(TransformConfig):
    """Scales of input channels that even out activations, folded into the norm or linear before.

    alpha: how much of the difference between channels goes from activations into weights.
    """

    name: ClassVar[str] = "smoothquant"
    transform: ClassVar[str] = "bitmill.transforms.smoothquant.scaling:SmoothScaling"
    folded: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    alpha: float = Field(default=0.5, ge=0, le=1)

    def stored(self, shape: LinearShape) -> tuple[TensorInfo, ...]:
        return ()
