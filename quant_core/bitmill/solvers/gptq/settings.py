"""Settings of GPTQ."""

from __future__ import annotations

from dataclasses import dataclass, field

from bitmill.quant.grid import ClipSettings
from bitmill.solvers.factor import DAMPING_LADDER
from bitmill.solvers.grid_search import CompensatedSettings

SUPER_BLOCK = 4
"""Groups whose errors reach the columns behind them in one product."""


@dataclass(frozen=True)
class GptqSettings:
    """Every part has a switch.

    clip: clip search of the grid
    compensated: search of the grid by GPTQ's own loss after the clip search, or None
    damping: shares of mean(diag H) that are tried until the factorization succeeds
    rounds: sweeps of polishing, 0 for none
    """

    clip: ClipSettings = field(default_factory=ClipSettings)
    compensated: CompensatedSettings | None = field(default_factory=CompensatedSettings)
    damping: tuple[float, ...] = DAMPING_LADDER
    rounds: int = 4
