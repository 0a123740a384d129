"""Settings of transform "awq". Torch-free."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from bitmill.config.bit_width_map import LinearShape
from bitmill.config.transforms import TransformConfig
from bitmill.io.safetensors import TensorInfo


class AWQ(TransformConfig):
    """Activation-aware scales of input channels, folded into the norm or linear before.

    steps: exponents that are tried, beside no scales at all.
    """

    name: ClassVar[str] = "awq"
    transform: ClassVar[str] = "bitmill.transforms.awq.scaling:AwqScaling"
    folded: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    steps: int = Field(default=20, ge=1, le=100)

    def stored(self, shape: LinearShape) -> tuple[TensorInfo, ...]:
        return ()
