"""Another budget for a stored profile: pure numbers, milliseconds, no accelerator.

A profile's folder holds the profile and the plan of the model it was made for, so the model's own
files are not needed any more.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bitmill.allocate import allocate
from bitmill.bits import BitWidthMap
from bitmill.budget import footprint
from bitmill.errors import BudgetError
from bitmill.plan import Plan
from bitmill.profile import SensitivityProfile
from bitmill.spec import Allocation, Budget, JobSpec, PathModel
from bitmill.storage import read_json
from bitmill_service import schemas
from bitmill_workers.records import ProfileRecord

PLAN_FILE = "plan.json"


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
    """The map for the requested budget; raises `BudgetError` and `SpecError` like a job would."""
    allocation = request.allocation or _default_allocation(stored)
    found = _allocate(stored, allocation, request.budget)
    cost = footprint(stored.plan, found)
    return schemas.AllocationView(
        profile_id=stored.record.id,
        map=found,
        code_bits=cost.code_bits,
        bits=cost.bits,
        size=cost.size,
        predicted_loss=_predicted(stored, found),
        curve=[_point(stored, allocation, request.budget.kind, v) for v in request.curve],
    )


def _default_allocation(stored: StoredProfile) -> Allocation:
    order = "activation" if stored.profile.orders else "natural"
    method = "knapsack" if _has_costs(stored.profile) else "sba"
    widths = stored.profile.widths if method == "knapsack" else Allocation().widths
    return Allocation.model_validate({"method": method, "order": order, "widths": widths})


def _has_costs(profile: SensitivityProfile) -> bool:
    return bool(profile.widths)


def _allocate(stored: StoredProfile, allocation: Allocation, budget: Budget) -> BitWidthMap:
    spec = JobSpec(model=PathModel(path="profile"), budget=budget, allocation=allocation)
    return allocate(stored.plan, spec, stored.profile)


def _predicted(stored: StoredProfile, found: BitWidthMap) -> float | None:
    return stored.profile.predicted_loss(found.linears) if _has_costs(stored.profile) else None


def _point(
    stored: StoredProfile, allocation: Allocation, kind: str, value: float
) -> schemas.CurvePoint:
    try:
        budget = Budget.model_validate({kind: int(value) if kind == "size" else value})
        found = _allocate(stored, allocation, budget)
    except (BudgetError, ValueError) as error:
        return schemas.CurvePoint(budget=value, error=str(error))
    cost = footprint(stored.plan, found)
    return schemas.CurvePoint(
        budget=value,
        code_bits=cost.code_bits,
        bits=cost.bits,
        size=cost.size,
        predicted_loss=_predicted(stored, found),
    )
