"""Settings of method "exllama". Torch-free."""

from __future__ import annotations

from typing import ClassVar

from bitmill.config.methods import MethodConfig


class ExLlama(MethodConfig):
    """GPTQ on the grid of ExLlamaV2, so that its format holds the result without loss.

    One device: a scale belongs to all rows of a group.
    """

    name: ClassVar[str] = "exllama"
    solver: ClassVar[str] = "bitmill.solvers.exllama.solver:ExLlamaSolver.of"
    grid: ClassVar[str | None] = "exl2"
    max_devices: ClassVar[int | None] = 1
