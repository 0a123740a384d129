"""Stage `allocate` for a target of loss: the smallest map whose measured loss is within it.

The profile predicts how the loss falls with size; what it is, is measured. A step takes the
smallest map whose predicted loss is within an aim, refines it as the job will and measures its KL
on the held-out windows; the next aim follows from how far that was off the map's own prediction,
which the smallest map of all may have far below the aim (a secant in logarithms).
Where few windows were profiled the first prediction may be several times too low, so the first map
is looked at behind a third of its blocks and, if it is far off, replaced.
What counts is the upper end of the 95 % interval over windows. Of the maps within the target the
smallest is kept, after at most `SEARCH_STEPS` of them, and its refined blocks for stage `refine`.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bitmill.allocation.allocator import Allocator
from bitmill.allocation.profile import SensitivityProfile
from bitmill.config.bit_width_map import MAP_NAME, BitWidthMap
from bitmill.config.quantization import Allocation
from bitmill.errors import BudgetError
from bitmill.formats.accounting import Footprint, footprint
from bitmill.io.atomic import read_json, write_bytes, write_json
from bitmill.pipeline.estimate import SEARCH_STEPS, first_blocks
from bitmill.pipeline.stage import Run, Stage
from bitmill.pipeline.stages import refine
from bitmill.pipeline.stages.allocate import Allocated
from bitmill.pipeline.stages.refined_loss import first_loss, refined_loss

CLOSE_ENOUGH = 0.85
"""Share of the target from which on a smaller map is not looked for."""
MARGIN = 0.95
"""Share of the target that a step aims at."""
HOPELESS = 2.0
"""Times the target from which on a first map is given up."""
CONFIDENCE = 1.96
LOOK_NAME = "first-look.json"
NOTE_NAME = "search.json"


@dataclass(frozen=True)
class Inputs:
    """target: nats a token. refining: how any map is refined; its own map is not used."""

    target: float
    allocation: Allocation
    profile: SensitivityProfile
    refining: refine.Inputs


@dataclass(frozen=True)
class Point:
    """predicted: a map's loss by the profile; upper: end of the interval of its measured KL."""

    predicted: float
    upper: float


@dataclass(frozen=True)
class Step(Point):
    """A measured map."""

    bit_widths: BitWidthMap
    spent: Footprint
    kl: float


def work(inputs: Inputs, run: Run, folder: Path) -> None:
    """Raises `BudgetError` where no step came within the target, with the nearest."""
    allocator = Allocator(inputs.refining.plan, inputs.allocation, inputs.profile)
    steps: list[Step] = []
    given_up = _given_up(inputs, run, folder, allocator)
    aim = next_aim(given_up, inputs.target) if given_up else inputs.target * MARGIN
    while len(steps) < SEARCH_STEPS:
        found = allocator.within_loss(aim)
        if any(step.bit_widths == found for step in steps):
            break
        steps.append(_measured(inputs, run, folder, steps, found))
        if CLOSE_ENOUGH * inputs.target <= steps[-1].upper <= inputs.target:
            break
        aim = next_aim([*given_up, *steps], inputs.target)
    best = _best(steps, inputs.target)
    if best is None:
        raise _out_of_reach(steps, inputs.target)
    if run.group.first:
        write_bytes(folder / MAP_NAME, best.bit_widths.to_json().encode())
        write_json(folder / NOTE_NAME, {"note": _note(best, steps, inputs.target)})


STAGE = Stage("allocate", work, version=4, shared=True, travels=True)


def load(folder: Path) -> tuple[Allocated, str]:
    """The map, and what the report says of the search."""
    note: str = read_json(folder / NOTE_NAME)["note"]
    return Allocated(BitWidthMap.load(folder / MAP_NAME), ()), note


def _given_up(inputs: Inputs, run: Run, folder: Path, allocator: Allocator) -> list[Point]:
    """The first map, where its first blocks have lost so much more than predicted that the whole
    would be hopeless, with what the whole would lose; else none."""
    plan = inputs.refining.plan
    count = first_blocks(plan)
    if not count:
        return []
    record = folder / LOOK_NAME
    if run.group.broadcast(record.is_file()):
        return [Point(*point) for point in read_json(record)]
    scratch = _scratch(folder, 0)
    found = allocator.within_loss(inputs.target * MARGIN)
    first = {name: own for name, own in found.linears.items() if plan.by_name[name].block < count}
    part, whole = map(inputs.profile.predicted_loss, (first, found.linears))
    if not part:
        return []
    kl, kl_se = first_loss(inputs.refining, found, run, scratch, count)
    expected = (kl + CONFIDENCE * kl_se) * whole / part
    points = [Point(whole, expected)] if expected > HOPELESS * inputs.target else []
    if run.group.first:
        if points:
            shutil.rmtree(scratch)
        write_json(record, [[point.predicted, point.upper] for point in points])
    run.group.barrier()
    return points


def _scratch(folder: Path, step: int) -> Path:
    return folder / f"measured-{step}"


def _measured(
    inputs: Inputs, run: Run, folder: Path, steps: Sequence[Step], found: BitWidthMap
) -> Step:
    """The next step, behind which the blocks of the best one are kept."""
    spent = footprint(inputs.refining.plan, found)
    predicted = inputs.profile.predicted_loss(found.linears)

    def step_of(kl: float, kl_se: float) -> Step:
        return Step(predicted, kl + CONFIDENCE * kl_se, found, spent, kl)

    def is_best(kl: float, kl_se: float) -> bool:
        step = step_of(kl, kl_se)
        return _best([*steps, step], inputs.target) is step

    scratch = _scratch(folder, len(steps))
    return step_of(*refined_loss(inputs.refining, found, run, scratch, is_best))


def _best(steps: Sequence[Step], target: float) -> Step | None:
    """The smallest map within the target, the first of equal ones."""
    within = [step for step in steps if step.upper <= target]
    return min(within, key=lambda step: step.spent.size, default=None)


def next_aim(steps: Sequence[Point], target: float) -> float:
    """The predicted loss to allow next: where ln(upper), linear in ln(predicted), meets the target.

    Below that of a map beyond the target, so the same map is not found again where another is left.
    """
    last = steps[-1]
    slope = 1.0
    if len(steps) > 1 and steps[-2].predicted != last.predicted and steps[-2].upper != last.upper:
        before = steps[-2]
        slope = math.log(last.upper / before.upper) / math.log(last.predicted / before.predicted)
    wanted = MARGIN * target / max(last.upper, 1e-9)
    return float(last.predicted * wanted ** (1 / min(2.0, max(0.5, slope))))


def _note(best: Step, steps: Sequence[Step], target: float) -> str:
    return (
        f"max_loss_increase {target:g}: {best.spent.bits:.3f} bits, {best.spent.size:,} bytes, "
        f"measured KL {best.kl:.4g} on held-out windows, at most {best.upper:.4g} "
        f"(95 %), after {len(steps)} of at most {SEARCH_STEPS} maps"
    )


def _out_of_reach(steps: Sequence[Step], target: float) -> BudgetError:
    nearest = min(steps, key=lambda step: step.upper)
    spent = nearest.spent
    return BudgetError(
        f"budget max_loss_increase = {target:g} cannot be met: the nearest of {len(steps)} measured"
        f" maps takes {spent.bits:.3f} bits ({spent.size:,} bytes) and has a KL of up to "
        f"{nearest.upper:.4g}",
        param="budget.max_loss_increase",
        hint="Allow a greater loss, larger widths or more effort.",
    )
