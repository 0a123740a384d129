"""Settings of method "hqq". Torch-free."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from bitmill.config.methods import MethodConfig, Statistic


class HQQ(MethodConfig):
    """Half-quadratic quantization: grids fitted to the weights alone, without calibration.

    norm: p of the sum of |w - ŵ|^p that is made small; a small p cuts outliers off. iterations: of
    the half-quadratic solver for every starting grid.
    """

    name: ClassVar[str] = "hqq"
    solver: ClassVar[str] = "bitmill.solvers.hqq.solver:HqqSolver.of"

    norm: float = Field(default=3.0, gt=0, le=8)
    iterations: int = Field(default=6, ge=0, le=100)

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset()
