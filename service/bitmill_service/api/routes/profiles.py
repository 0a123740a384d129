"""Sensitivity profiles: look at them, and spend new budgets on them without an accelerator."""

from __future__ import annotations

import shutil
from typing import Annotated

from fastapi import APIRouter, Path, Query, status

from bitmill_service.api.context import ID_PATTERN, Context, ContextDep, PrincipalDep
from bitmill_service.api.reallocation import StoredProfile, load_profile, reallocate
from bitmill_service.api.views import profile_view
from bitmill_service.http.access import Principal
from bitmill_service.http.openapi import CHANGES, JSON_BODY, refusals
from bitmill_service.http.problems import ProblemError
from bitmill_service.schemas import AllocationRequest, AllocationView, ProfilePage, ProfileView
from bitmill_workers.storage.artifacts import PROFILES
from bitmill_workers.store.records import ProfileRecord

router = APIRouter(prefix="/v1/profiles", tags=["profiles"])

ProfileId = Annotated[
    str, Path(pattern=ID_PATTERN, description="Hash of what the profile was made from.")
]


@router.get("", response_model=ProfilePage)
def list_profiles(
    context: ContextDep,
    caller: PrincipalDep,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    after: Annotated[str | None, Query(pattern=ID_PATTERN)] = None,
) -> ProfilePage:
    """Stored profiles by id."""
    found = context.catalog.profiles(tenant=caller.sees, limit=limit, after=after)
    return ProfilePage(
        profiles=[profile_view(record) for record in found],
        next=found[-1].id if len(found) == limit else None,
    )


@router.get(
    "/{profile_id}",
    response_model=ProfileView,
    responses=refusals("profile_not_found", "storage_unavailable"),
)
def get_profile(profile_id: ProfileId, context: ContextDep, caller: PrincipalDep) -> ProfileView:
    """One profile with its widths and counts."""
    stored = _load(context, caller, profile_id)
    return profile_view(stored.record, stored.model.profile)


@router.post(
    "/{profile_id}/allocate",
    response_model=AllocationView,
    responses=refusals(*JSON_BODY, "profile_not_found", "storage_unavailable"),
)
def allocate_budget(
    profile_id: ProfileId,
    request: AllocationRequest,
    context: ContextDep,
    caller: PrincipalDep,
) -> AllocationView:
    """A bit-width map for another budget: exact size, predicted loss, and a curve if asked."""
    return reallocate(_load(context, caller, profile_id), request)


@router.delete(
    "/{profile_id}",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=refusals(*CHANGES, "profile_not_found", "profile_in_use", "storage_unavailable"),
)
def delete_profile(profile_id: ProfileId, context: ContextDep, caller: PrincipalDep) -> None:
    """Remove a profile; others whose jobs made the same keep theirs."""
    _require(context, caller, profile_id)
    if context.catalog.profile_in_use(profile_id):
        raise ProblemError("profile_in_use", f"a running job works with profile {profile_id}")
    if context.catalog.drop("profile", profile_id, tenant=caller.sees):
        context.artifacts.remove_folder(PROFILES, profile_id)
        shutil.rmtree(context.settings.profiles_folder / profile_id, ignore_errors=True)


def _require(context: Context, caller: Principal, profile_id: str) -> ProfileRecord:
    record = context.catalog.profile(profile_id, tenant=caller.sees)
    if record is None:
        raise ProblemError(
            "profile_not_found", f"there is no profile {profile_id!r}", param="profile_id"
        )
    return record


def _load(context: Context, caller: Principal, profile_id: str) -> StoredProfile:
    record = _require(context, caller, profile_id)
    root = context.settings.profiles_folder
    root.mkdir(parents=True, exist_ok=True)
    context.artifacts.fetch_folder(PROFILES, record.id, root / record.id)
    return load_profile(root, record)
