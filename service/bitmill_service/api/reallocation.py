"""Another budget for a stored profile: pure numbers, milliseconds, no accelerator."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bitmill.allocation.allocator import Allocator
from bitmill.allocation.profiled import ProfiledModel
from bitmill.config.quantization import Budget
from bitmill.errors import BudgetError, reason
from bitmill.plan.serving_memory import beside_weights
from bitmill_service import schemas
from bitmill_service.api.context import Context
from bitmill_service.http.access import Principal
from bitmill_service.http.problems import ProblemError
from bitmill_workers.storage.artifacts import PROFILES
from bitmill_workers.store.records import ProfileRecord


@dataclass(frozen=True)
class StoredProfile:
    """A profile from disk, with its record."""

    record: ProfileRecord
    model: ProfiledModel


def find_profile(context: Context, caller: Principal, profile_id: str) -> ProfileRecord:
    """Raises `ProblemError` `profile_not_found` where the caller can see none."""
    record = context.catalog.profile(profile_id, tenant=caller.sees)
    if record is None:
        raise ProblemError(
            "profile_not_found", f"there is no profile {profile_id!r}", param="profile_id"
        )
    return record


def open_profile(context: Context, caller: Principal, profile_id: str) -> StoredProfile:
    """Fetch a profile where it lies elsewhere, and read it.

    Its model is called what the caller's job calls it; the files have the name of whoever was
    first. Raises as `find_profile` does, and `FormatError` where it is damaged.
    """
    record = find_profile(context, caller, profile_id)
    root = context.settings.profiles_folder
    root.mkdir(parents=True, exist_ok=True)
    context.artifacts.fetch_folder(PROFILES, record.id, root / record.id)
    model = ProfiledModel.load(root / record.path)
    if model.made_for is not None:
        named = model.made_for.model_copy(update={"model": record.model})
        model = replace(model, made_for=named)
    return StoredProfile(record, model)


def reallocate(stored: StoredProfile, request: schemas.AllocationRequest) -> schemas.AllocationView:
    """The map for the requested budget, and the curve; one allocator serves all of them.

    Raises `BudgetError` and `SpecError` like a job would, and `SpecError` where the allocation
    asks for other groups than the profile has.
    """
    asked = request.allocation.model_dump(exclude_unset=True) if request.allocation else {}
    allocator = stored.model.allocator(asked)
    found = stored.model.allocate(request.budget, allocator)
    if request.curve:
        curve = [_point(stored.model, allocator, request.budget, value) for value in request.curve]
    else:
        curve = _whole_curve(allocator, request.budget)
    return schemas.AllocationView(profile_id=stored.record.id, curve=curve, **dict(found))


def _whole_curve(allocator: Allocator, budget: Budget) -> list[schemas.BudgetPoint]:
    """From the smallest to the largest map; empty where the profile has no costs."""
    if not allocator.profile.widths:
        return []
    points = [point.model_dump() for point in allocator.curve()]
    named = {"memory": "size", "max_loss_increase": "predicted_loss"}
    kind = named.get(budget.kind, budget.kind)
    beside = beside_weights(allocator.plan, budget)
    return [schemas.BudgetPoint(budget=point[kind] + beside, **point) for point in points]


def _point(
    model: ProfiledModel, allocator: Allocator, budget: Budget, value: float
) -> schemas.BudgetPoint:
    limit = {budget.kind: int(value) if budget.in_bytes else value}
    try:
        found = model.allocate(Budget.model_validate(budget.model_dump() | limit), allocator)
    except (BudgetError, ValueError) as error:
        return schemas.BudgetPoint(budget=value, error=reason(error))
    return schemas.BudgetPoint(budget=value, **found.model_dump(exclude={"map"}))
