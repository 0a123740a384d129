"""Sensitivity profiles: look at them, and spend new budgets on them without an accelerator."""

from __future__ import annotations

import shutil
from typing import Annotated

from fastapi import APIRouter, Path, Query, Response, status

from bitmill_service.api.context import ID_PATTERN, ContextDep, HashCursor, PrincipalDep
from bitmill_service.api.group_arrays import ARRAYS, MEDIA_TYPE, profile_maps
from bitmill_service.api.reallocation import find_profile, open_profile, reallocate
from bitmill_service.api.views import profile_view
from bitmill_service.http.openapi import CHANGES, JSON_BODY, refusals
from bitmill_service.schemas import AllocationRequest, AllocationView, ProfilePage, ProfileView
from bitmill_workers.storage.artifacts import PROFILES

router = APIRouter(prefix="/v1/profiles", tags=["profiles"])

ProfileId = Annotated[
    str, Path(pattern=ID_PATTERN, description="Hash of what the profile was made from.")
]


@router.get("", response_model=ProfilePage)
def list_profiles(
    context: ContextDep,
    caller: PrincipalDep,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    after: Annotated[HashCursor | None, Query()] = None,
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
    stored = open_profile(context, caller, profile_id)
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
    return reallocate(open_profile(context, caller, profile_id), request)


@router.get(
    "/{profile_id}/maps",
    response_class=Response,
    responses=refusals("profile_not_found", "storage_unavailable") | {200: ARRAYS},
)
def read_maps(
    profile_id: ProfileId,
    context: ContextDep,
    caller: PrincipalDep,
    points: Annotated[int, Query(ge=2, le=64, description="Maps, evenly spaced in bytes.")] = 32,
) -> Response:
    """The curve of size against predicted loss with all its maps, in a safetensors file.

    P maps of T groups, from the smallest to the largest: `widths` (u8 [P, T]), `size`, `bits`,
    `code_bits` and `predicted_loss` (f64 [P]); the same for one width everywhere, with the prefix
    `uniform_`; `costs` (f32 [T, B]) and `bytes_at` (i32 [T, B]) of every group at the widths
    `legal` (u8 [B]); `names`, `starts` and `shapes` as in a job's groups.
    """
    model = open_profile(context, caller, profile_id).model
    headers = {"cache-control": "private, max-age=3600"}
    return Response(profile_maps(model, points), media_type=MEDIA_TYPE, headers=headers)


@router.delete(
    "/{profile_id}",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=refusals(*CHANGES, "profile_not_found", "profile_in_use", "storage_unavailable"),
)
def delete_profile(profile_id: ProfileId, context: ContextDep, caller: PrincipalDep) -> None:
    """Remove a profile that no running job works with; others whose jobs made the same keep it."""
    find_profile(context, caller, profile_id)
    if context.catalog.drop("profile", profile_id, tenant=caller.sees):
        context.artifacts.remove_folder(PROFILES, profile_id)
        shutil.rmtree(context.settings.profiles_folder / profile_id, ignore_errors=True)
