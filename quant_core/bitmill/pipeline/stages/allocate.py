"""Stage `allocate`: the bit-width map. Pure numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bitmill.allocation.allocator import allocate
from bitmill.allocation.profile import SensitivityProfile
from bitmill.allocation.unspent import unspent_warning
from bitmill.config.bit_width_map import MAP_NAME, BitWidthMap
from bitmill.config.codes import CodeName
from bitmill.config.quantization import Allocation, Budget, QuantizationConfig
from bitmill.io.atomic import write_bytes
from bitmill.pipeline.stage import Run, Stage
from bitmill.plan.model_plan import Plan


@dataclass(frozen=True)
class Inputs:
    """profile: where the method needs one."""

    plan: Plan
    code: CodeName
    allocation: Allocation
    budget: Budget
    profile: SensitivityProfile | None

    @classmethod
    def of(
        cls, plan: Plan, config: QuantizationConfig, profile: SensitivityProfile | None
    ) -> Inputs:
        """What of a configuration decides the map."""
        measured = profile if config.allocation.method in ("sba", "knapsack") else None
        return cls(plan, config.code, config.allocation, config.budget, measured)


def work(inputs: Inputs, run: Run, folder: Path) -> None:
    """Raises what `bitmill.allocation.allocator.allocate` raises."""
    asked = QuantizationConfig(code=inputs.code, allocation=inputs.allocation, budget=inputs.budget)
    made = allocate(inputs.plan, asked, inputs.profile)
    if unspent := unspent_warning(inputs.plan, asked, made):
        run.warn(unspent)
    write_bytes(folder / MAP_NAME, made.to_json().encode())


STAGE = Stage("allocate", work)


def load(folder: Path) -> BitWidthMap:
    """What the stage made."""
    return BitWidthMap.load(folder / MAP_NAME)
