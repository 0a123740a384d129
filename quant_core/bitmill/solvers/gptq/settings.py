"""Settings of GPTQ."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from bitmill.quant.grid import ClipSettings
from bitmill.solvers.factor import DAMPING_LADDER
from bitmill.solvers.grid_search import CompensatedSettings


@dataclass(frozen=True)
class GptqSettings:
    """Every part has a switch.

    clip_weight: columns weigh diag(H) or 1 / U_jj^2 in the clip search
    compensated: search of the grid by GPTQ's own loss after the clip search, or None
    rounds: sweeps of polishing; refit, descent: whether scales and codes take part in them
    """

    clip: ClipSettings = field(default_factory=ClipSettings)
    clip_weight: Literal["hessian", "schur"] = "hessian"
    compensated: CompensatedSettings | None = field(default_factory=CompensatedSettings)
    damping: tuple[float, ...] = DAMPING_LADDER
    super_block: int = 4
    rounds: int = 4
    refit: bool = True
    descent: bool = True
