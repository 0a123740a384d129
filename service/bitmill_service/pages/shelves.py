"""What outlives jobs: sensitivity profiles, bit-width maps and uploads."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import RedirectResponse

from bitmill_service.api.context import ContextDep, HashCursor, PrincipalDep
from bitmill_service.api.routes import maps as maps_api
from bitmill_service.api.routes import profiles as profiles_api
from bitmill_service.api.routes import uploads as uploads_api
from bitmill_service.http.access import PAGES, Principal
from bitmill_service.pages.rendering import render

router = APIRouter()

After = Annotated[HashCursor | None, Query()]


def _told_of_holders(caller: Principal) -> bool:
    """Whether whose words a list has is shown: to who sees several tenants' things."""
    return caller.sees is None and caller.key_id is not None


@router.get("/profiles")
def show_profiles(
    request: Request, context: ContextDep, caller: PrincipalDep, after: After = None
) -> Response:
    """Stored profiles."""
    page = profiles_api.list_profiles(context, caller, after=after)
    return render(request, "profiles.html", page=page, holders=_told_of_holders(caller))


@router.post("/profiles/{profile_id}/delete")
def delete_profile(profile_id: str, context: ContextDep, caller: PrincipalDep) -> Response:
    """End the caller's hold of a profile."""
    profiles_api.delete_profile(profile_id, context, caller)
    return RedirectResponse(f"{PAGES}/profiles", 303)


@router.get("/bit-width-maps")
def show_maps(
    request: Request, context: ContextDep, caller: PrincipalDep, after: After = None
) -> Response:
    """Uploaded maps."""
    page = maps_api.list_maps(context, caller, after=after)
    return render(request, "maps.html", page=page, holders=_told_of_holders(caller))


@router.post("/bit-width-maps/{map_id}/delete")
def delete_map(map_id: str, context: ContextDep, caller: PrincipalDep) -> Response:
    """End the caller's hold of a map."""
    maps_api.delete_map(map_id, context, caller)
    return RedirectResponse(f"{PAGES}/bit-width-maps", 303)


@router.get("/uploads")
def show_uploads(request: Request, context: ContextDep, caller: PrincipalDep) -> Response:
    """Uploads, and how to make one."""
    found = uploads_api.list_uploads(context, caller)
    return render(request, "uploads.html", uploads=found.uploads)


@router.post("/uploads/{upload_id}/delete")
def delete_upload(upload_id: str, context: ContextDep, caller: PrincipalDep) -> Response:
    """Remove an upload."""
    uploads_api.delete_upload(upload_id, context, caller)
    return RedirectResponse(f"{PAGES}/uploads", 303)
