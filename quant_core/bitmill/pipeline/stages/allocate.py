"""Stage `allocate`: the bit-width map, the better one of those that held-out windows were asked.

A knapsack's map, the uniform one of the same budget and, where widths 0 or 1 are allowed, the
knapsack's without each and without both are quantized in haste and measured
(`sensitivity/checked_maps.py`), and with `check` "corrected" so is the knapsack's of costs that
were corrected by parts of its first map. The one of least KL is taken. So no map is shipped that
loses more than the uniform one does. Other methods are taken at their word, and so is a knapsack
with `check` "off", without held-out windows or of trellis codes, each map of which would take a
search through all weights.

Refinement makes up for more of what 1 bit costs than of what a dropped group does. So where the map
of least KL has dropped groups, it and the best one without are refined as the job will, and what
they lose then decides (`refined_loss.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from bitmill.allocation.allocator import allocate
from bitmill.allocation.profile import SensitivityProfile
from bitmill.allocation.unspent import unspent_warning
from bitmill.calibration.windows import CalibrationSet
from bitmill.config.bit_width_map import DROPPED, MAP_NAME, BitWidthMap
from bitmill.config.codes import CodeName
from bitmill.config.quantization import Allocation, Budget, QuantizationConfig
from bitmill.errors import BudgetError
from bitmill.evaluation.logits import WindowMeasures
from bitmill.formats.accounting import footprint
from bitmill.io.atomic import read_json, write_bytes, write_json
from bitmill.pipeline.source import Model, Source
from bitmill.pipeline.stage import Environment, Run, Stage
from bitmill.pipeline.stages import refine
from bitmill.pipeline.stages.refined_loss import refined_loss
from bitmill.plan.model_plan import Plan
from bitmill.results import CheckedMap
from bitmill.sensitivity.checked_maps import Measured, corrected, measure_maps, parts_of

CHECKS_NAME = "checked_maps.json"
REFINED = ", refined"
"""Behind the names of maps that were measured refined."""
NEAR = 1.5
"""Predicted losses stay as they are where they are at most so many times off."""
LEFT_BY_REFINEMENT = 0.6
"""What whole refinement leaves of the loss that the check measures, which is of plain GPTQ without
the correction for the prefix: 0.48 to 0.72 in four jobs on two models, 2.2 to 3.2 true bits
(`docs/allocation.md`)."""


@dataclass(frozen=True)
class Check:
    """What maps are measured with."""

    model: Model
    calibration: CalibrationSet
    environment: Environment


@dataclass(frozen=True)
class DroppingCheck(Check):
    """refining: how maps are refined, where groups may be dropped; its own map is not used."""

    refining: refine.Inputs


@dataclass(frozen=True)
class Inputs:
    """profile: where the method needs one. check: where maps are measured."""

    plan: Plan
    code: CodeName
    allocation: Allocation
    budget: Budget
    profile: SensitivityProfile | None
    check: Check | None

    @classmethod
    def of(
        cls,
        source: Source,
        plan: Plan,
        config: QuantizationConfig,
        calibration: CalibrationSet,
        profile: SensitivityProfile | None,
        environment: Environment,
    ) -> Inputs:
        """What of a job decides the map."""
        allocation = config.allocation
        if allocation.map is not None:  # what it was made for changes nothing
            allocation = allocation.model_copy(update={"map": allocation.map.of(None)})
        measured = profile if allocation.method in ("sba", "knapsack") else None
        checked = allocation.method == "knapsack" and allocation.check != "off"
        check = None
        if checked and config.code_name == "affine" and len(calibration.held_out):
            check = Check(source.planned(plan), calibration, environment)
            if DROPPED in allocation.legal_widths:
                start = BitWidthMap.uniform(plan.shapes, 2, allocation.order)
                refining = refine.Inputs.of(
                    source, plan, calibration, start, profile, config, environment
                )
                check = DroppingCheck(check.model, calibration, environment, refining)
        return cls(plan, config.code, allocation, config.budget, measured, check)


@dataclass(frozen=True)
class Allocated:
    """The map, and what was measured of it and of others."""

    bit_widths: BitWidthMap
    checks: tuple[CheckedMap, ...]

    @property
    def correction(self) -> float:
        """What predicted losses are multiplied by in reports; 1 where they were near."""
        taken = next((check for check in self.checks if check.taken), None)
        if taken is None or not (taken.kl > 0 and taken.predicted_loss > 0):
            return 1.0
        left = 1.0 if taken.method.endswith(REFINED) else LEFT_BY_REFINEMENT
        found = left * taken.kl / taken.predicted_loss
        return 1.0 if 1 / NEAR <= found <= NEAR else found

    def corrected(self, profile: SensitivityProfile | None) -> SensitivityProfile | None:
        """The profile with costs as large as they were measured to be."""
        return profile and profile.scaled(self.correction)


def work(inputs: Inputs, run: Run, folder: Path) -> None:
    """Raises what `bitmill.allocation.allocator.allocate` raises."""
    asked = QuantizationConfig(code=inputs.code, allocation=inputs.allocation, budget=inputs.budget)
    method: str = inputs.allocation.method
    maps = {method: allocate(inputs.plan, asked, inputs.profile)}
    checks: list[CheckedMap] = []
    if inputs.check is not None and inputs.profile is not None:
        maps |= dict(_others(inputs, asked))
        checking = _Checking(inputs.plan, inputs.profile, inputs.check, run)
        measured = checking.measured(maps, by_parts=inputs.allocation.check == "corrected")
        found = measured.maps
        if measured.parts:
            kl = float(found[method].kl.mean())
            better = corrected(inputs.profile, inputs.plan, maps[method], kl, measured)
            last = {"knapsack, corrected": allocate(inputs.plan, asked, better)}
            found |= checking.measured(last, by_parts=False).maps
            maps |= last
        checks = checking.compared(maps, found)
        if isinstance(inputs.check, DroppingCheck):
            checks = _settled(inputs.check.refining, maps, checks, run, folder)
    taken = next((check.method for check in checks if check.taken), method).removesuffix(REFINED)
    if not run.group.first:
        return
    if checks and taken == "uniform":
        run.warn("the uniform map lost less on held-out windows than the knapsack's and is taken")
    if unspent := unspent_warning(inputs.plan, asked, maps[taken]):
        run.warn(unspent)
    write_bytes(folder / MAP_NAME, maps[taken].to_json().encode())
    write_json(folder / CHECKS_NAME, [check.model_dump(mode="json") for check in checks])


STAGE = Stage("allocate", work, shared=True, travels=True)


def load(folder: Path) -> Allocated:
    """What the stage made."""
    checks = read_json(folder / CHECKS_NAME)
    return Allocated(
        BitWidthMap.load(folder / MAP_NAME),
        tuple(CheckedMap.model_validate(check) for check in checks),
    )


def _others(inputs: Inputs, asked: QuantizationConfig) -> Iterator[tuple[str, BitWidthMap]]:
    """Maps that may be better than the knapsack's, where the budget has them."""
    legal = inputs.allocation.legal_widths
    kept = tuple(width for width in legal if width != DROPPED)
    simple = {"method": "uniform", "widths": kept, "outliers": ()}
    changes: dict[str, dict[str, Any]] = {"uniform": simple}
    if inputs.allocation.outliers:
        changes["knapsack without outliers"] = {"outliers": ()}
    for without in ((DROPPED,), (1,), (DROPPED, 1)):
        others = tuple(width for width in legal if width not in without)
        if set(without) <= set(legal) and any(others):
            name = f"width{'s' if len(without) > 1 else ''} {' and '.join(map(str, without))}"
            changes[f"knapsack without {name}"] = {"widths": others}
    for name, change in changes.items():
        allocation = inputs.allocation.model_copy(update=change)
        other = asked.model_copy(update={"allocation": allocation})
        with suppress(BudgetError):
            yield name, allocate(inputs.plan, other, inputs.profile)


def _settled(
    refining: refine.Inputs,
    maps: Mapping[str, BitWidthMap],
    checks: list[CheckedMap],
    run: Run,
    folder: Path,
) -> list[CheckedMap]:
    """The checks, with those of the taken map and of the best one without dropped groups, both
    refined, of which the better is taken then; as they are where the taken one drops nothing."""
    dropping = {name for name, one in maps.items() if DROPPED in chain(*one.linears.values())}
    taken = next(check for check in checks if check.taken)
    others = [check for check in checks if check.method not in dropping]
    if taken.method not in dropping or not others:
        return checks
    refined: list[CheckedMap] = []
    for one in (min(others, key=lambda check: check.kl), taken):
        scratch = folder / f"refined-{len(refined)}"
        kl, kl_se = refined_loss(refining, maps[one.method], run, scratch)
        measured = {"method": one.method + REFINED, "kl": kl, "kl_se": kl_se, "taken": False}
        refined.append(one.model_copy(update=measured))
    best = min(refined, key=lambda check: check.kl)
    every = [*checks, *refined]
    return [check.model_copy(update={"taken": check is best}) for check in every]


@dataclass(frozen=True)
class _Checking:
    """Measures maps and compares them."""

    plan: Plan
    profile: SensitivityProfile
    check: Check
    run: Run

    def measured(self, maps: Mapping[str, BitWidthMap], by_parts: bool) -> Measured:
        """See `measure_maps`; by_parts: of the first map."""
        profile = self.profile
        orders = {owner: torch.from_numpy(order).long() for owner, order in profile.orders.items()}
        return measure_maps(
            self.run.open_model(self.check.model.folder, self.plan),
            self.check.calibration,
            maps,
            {li.name: orders[li.order] for li in profile.linears if li.order is not None},
            self.run.on_unit,
            self.run.group,
            parts=parts_of(self.plan) if by_parts else None,
        )

    def compared(
        self, maps: Mapping[str, BitWidthMap], measured: Mapping[str, WindowMeasures]
    ) -> list[CheckedMap]:
        """What reports say of each map; the first of least KL is taken."""
        found = {name: one.candidate() for name, one in measured.items()}
        taken = min(found, key=lambda name: found[name].kl)
        return [
            CheckedMap(
                method=name,
                bits=footprint(self.plan, maps[name]).bits,
                predicted_loss=self.profile.predicted(maps[name]),
                kl=quality.kl,
                kl_se=quality.kl_se,
                taken=name == taken,
            )
            for name, quality in found.items()
        ]
