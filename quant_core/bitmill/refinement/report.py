"""What refinement did to each linear, in numbers that go into `quality.json`.

Errors are relative output errors on the calibration inputs, tr(R H R^T) / tr(W H W^T) with
R = W - ŵ: 0 is exact, 1 is as bad as dropping the linear.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class LinearReport:
    """One linear.

    error_rounding: plain rounding on the min-max grid at the same widths, for comparison
    error_solver:   after the method's own pass, before refit and descent
    error:          as stored
    damping:        share of mean(diag H) that the factorization needed; failed_dampings the
                    shares at which it failed; dead_columns the inputs no token touched
    tokens:         calibration tokens that reached the linear
    asymmetric:     strength of the prefix correction that was kept, 0 where it was not; ridge
                    the damping it was solved with, 0 for the factor's own
    held_out_error: against the source model's outputs on held-out tokens, in a sample of
                    rows and after a quick solve; held_out_symmetric the same without the correction
    """

    name: str
    method: str
    rows: int
    columns: int
    widths: str
    error_rounding: float
    error_solver: float
    error: float
    damping: float = 0.0
    failed_dampings: tuple[float, ...] = ()
    dead_columns: int = 0
    tokens: int = 0
    asymmetric: float = 0.0
    ridge: float = 0.0
    held_out_error: float | None = None
    held_out_symmetric: float | None = None

    @property
    def refit_gain(self) -> float:
        """Share of the solver's error that refit and descent removed."""
        return 1.0 - self.error / self.error_solver if self.error_solver > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values, `refit_gain` included."""
        return asdict(self) | {"refit_gain": self.refit_gain}


@dataclass(frozen=True)
class BlockReport:
    """All linears of one decoder block, in the order they were refined."""

    index: int
    linears: tuple[LinearReport, ...] = field(default_factory=tuple)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"index": self.index, "linears": [report.to_json() for report in self.linears]}
