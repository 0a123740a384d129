"""GPTQ on groups of 128 columns, each group with its own bit width.

    correction of the target (`correction.py`) -> column loop (`column_loop.py`) -> polish

After the loop, scales are refitted and codes descend once more (`solvers/polish.py`), which never
raises the error. Linears that read the same input share a `Curvature` (`curvature.py`).
"""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bitmill.config.methods import GPTQ
from bitmill.quant.codes import row_errors
from bitmill.quant.grid import ClipSettings
from bitmill.results import LinearResult
from bitmill.runtime.ranks import Ranks
from bitmill.runtime.timer import timed
from bitmill.solvers.gptq.column_loop import solve_siblings
from bitmill.solvers.gptq.correction import Goal, goals_of
from bitmill.solvers.gptq.curvature import Curvature
from bitmill.solvers.gptq.settings import GptqSettings
from bitmill.solvers.grid_search import CompensatedSettings
from bitmill.solvers.polish import polish_codes
from bitmill.solvers.solver import Linear, Solved


@dataclass(frozen=True)
class GptqSolver:
    """GPTQ as a solver (`solvers/solver.py`). ridges: of corrections, where there are shifts."""

    settings: GptqSettings = field(default_factory=GptqSettings)
    ridges: tuple[float, ...] = (0.0, 0.05, 0.5)

    @classmethod
    def of(cls, settings: GPTQ) -> GptqSolver:
        """The solver of a method's settings."""
        return cls(
            GptqSettings(
                clip=ClipSettings() if settings.clip_search else ClipSettings.min_max(),
                compensated=CompensatedSettings() if settings.compensated_grid else None,
                rounds=GptqSettings.rounds if settings.scale_refit else 0,
            )
        )

    def solve(self, linears: MutableSequence[Linear], H: Tensor | None, ranks: Ranks) -> Solved:
        """Plain solutions, or the corrected ones of least held-out error where they beat those."""
        assert H is not None
        corrected = any(linear.correction for linear in linears)
        curvature = Curvature.prepare(
            H,
            damping=self.settings.damping,
            name=linears[0].name,
            ridges=self.ridges if corrected else (),
            ranks=ranks,
        )
        return self.solve_with(linears, curvature, ranks)

    def solve_with(
        self, linears: MutableSequence[Linear], curvature: Curvature, ranks: Ranks
    ) -> Solved:
        """The same with H factored already.

        Ridges are compared as float targets on a sample of rows; the best is kept if it also wins
        there against no correction after the column loop of both, on clip-searched grids. All rows
        then go to the target kept, with the compensated search of grids and polishing. A large
        ridge keeps the correction to directions the calibration inputs hold much of, which few
        tokens call for.

        Corrections, which hold second moments, are taken out of `linears` once they are judged, and
        solvers out of `curvature`: the column loop needs their memory.
        """
        goals = goals_of(linears, curvature, self.ridges, self.quick, ranks)
        linears[:] = [replace(linear, correction=None) for linear in linears]
        curvature.solvers.clear()
        return _reach(linears, goals, curvature, self.settings)

    def quick(
        self,
        targets: Sequence[Tensor],
        curvature: Curvature,
        widths: Sequence[tuple[int, ...]],
    ) -> list[Tensor]:
        """Values of the column loop on clip-searched grids."""
        plain = replace(self.settings, compensated=None)
        return [codes.values() for codes in solve_siblings(targets, curvature, widths, plain)]


def _reach(
    linears: Sequence[Linear],
    goals: Sequence[Goal],
    curvature: Curvature,
    settings: GptqSettings,
) -> Solved:
    """Column loop and polishing towards the goals."""
    targets, widths = [goal.target for goal in goals], [linear.widths for linear in linears]
    sources = [goal.source for goal in goals]
    solved = solve_siblings(targets, curvature, widths, settings)
    final, errors = polish_codes(targets, sources, solved, curvature.H, sweeps=settings.rounds)
    with timed("report"):
        zeros = torch.stack([row_errors(W, curvature.H).sum() for W in sources])
    weights = [codes.finish() for codes in final]
    results = [
        _result(linear, goal, curvature) for linear, goal in zip(linears, goals, strict=True)
    ]
    return Solved(weights, results, torch.cat([zeros[None], errors]).T)


def _result(linear: Linear, goal: Goal, curvature: Curvature) -> LinearResult:
    """All but the errors, which `read_results` gives."""
    factor, notes = curvature.factor, []
    if factor.failed:
        notes.append(f"factorization failed at dampings {list(factor.failed)}")
    if factor.dead:
        notes.append(f"{factor.dead} dead input columns")
    found = {"damping": factor.damping, "asymmetric": goal.ridge is not None}
    return linear.result().model_copy(update={**found, "notes": tuple(notes)})
