"""Another budget for a stored profile: pure numbers, milliseconds, no accelerator.

A profile's folder holds the profile and the plan of the model it was made for, so the model's own
files are not needed any more.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bitmill.allocation.allocator import Allocator
from bitmill.allocation.profile import SensitivityProfile
from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.quantization import DEFAULT_WIDTHS, Allocation, Budget
from bitmill.errors import BudgetError, SpecError
from bitmill.formats.accounting import Kind, footprint
from bitmill.io.atomic import read_json
from bitmill.plan.model_plan import Plan
from bitmill_service import schemas
from bitmill_workers.store.records import ProfileRecord

PLAN_FILE = "plan.json"
CURVE_POINTS = 32


@dataclass(frozen=True)
class StoredProfile:
    """A profile from disk, with its record and the plan it belongs to."""

    record: ProfileRecord
    profile: SensitivityProfile
    plan: Plan


def load_profile(root: Path, record: ProfileRecord) -> StoredProfile:
    """Read a profile's folder; raises `FormatError` where it is damaged."""
    folder = root / record.path
    return StoredProfile(
        record=record,
        profile=SensitivityProfile.load(folder),
        plan=Plan.model_validate(read_json(folder / PLAN_FILE)),
    )


def reallocate(stored: StoredProfile, request: schemas.AllocationRequest) -> schemas.AllocationView:
    """The map for the requested budget, and the curve; one allocator serves all of them.

    Raises `BudgetError` and `SpecError` like a job would, and `SpecError` where the allocation
    asks for other groups than the profile has.
    """
    allocation = _allocation(stored, request.allocation)
    allocator = Allocator(stored.plan, allocation, stored.profile)
    found = allocator.map(request.budget)
    cost = footprint(stored.plan, found)
    if request.curve:
        curve = [_point(allocator, request.budget.kind, value) for value in request.curve]
    else:
        curve = _whole_curve(allocator, request.budget.kind)
    return schemas.AllocationView(
        profile_id=stored.record.id,
        map=found,
        code_bits=cost.code_bits,
        bits=cost.bits,
        size=cost.size,
        predicted_loss=_predicted(allocator, found),
        curve=curve,
    )


def _allocation(stored: StoredProfile, asked: Allocation | None) -> Allocation:
    """What was asked for; what was left open is as in the profile."""
    measured = {
        "order": "activation" if stored.profile.orders else "natural",
        "embeddings": "quantize" if stored.plan.embeddings else "keep",
        "keep": stored.profile.origin.config.keep or (),
    }
    given = {} if asked is None else asked.model_dump(exclude_unset=True)
    for name, value in measured.items():
        if given.get(name, value) != value:
            raise SpecError(
                f"allocation.{name} is {given[name]!r} but the profile was made with {value!r}, "
                "which decides its groups: leave it out, or submit a job, which makes a profile",
                param=f"allocation.{name}",
            )
    own = {"method": "knapsack" if stored.profile.widths else "sba"} | measured | given
    if own["method"] == "map":
        raise SpecError(
            "a given map leaves nothing to allocate: ask for knapsack, sba or uniform",
            param="allocation.method",
        )
    usual = tuple(width for width in DEFAULT_WIDTHS if width in stored.profile.widths)
    return Allocation.model_validate({"widths": usual or DEFAULT_WIDTHS} | own)


def _predicted(allocator: Allocator, found: BitWidthMap) -> float | None:
    profile = allocator.profile
    return profile.predicted_loss(found.linears) if profile.widths else None


def _whole_curve(allocator: Allocator, kind: Kind) -> list[schemas.BudgetPoint]:
    """From the smallest to the largest map; empty where the profile has no costs."""
    if not allocator.profile.widths:
        return []
    points = [point.model_dump() for point in allocator.curve(CURVE_POINTS)]
    return [schemas.BudgetPoint(budget=point[kind], **point) for point in points]


def _point(allocator: Allocator, kind: Kind, value: float) -> schemas.BudgetPoint:
    try:
        budget = Budget.model_validate({kind: int(value) if kind == "size" else value})
        found = allocator.map(budget)
    except (BudgetError, ValueError) as error:
        return schemas.BudgetPoint(budget=value, error=str(error))
    cost = footprint(allocator.plan, found)
    return schemas.BudgetPoint(
        budget=value,
        code_bits=cost.code_bits,
        bits=cost.bits,
        size=cost.size,
        predicted_loss=_predicted(allocator, found),
    )
