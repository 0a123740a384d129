"""Refuses bodies of another type than JSON where a route takes JSON.

curl's `-d` sends a form unless told otherwise; the answer has to say so, not that the body is no
object.
"""

from __future__ import annotations

from fastapi import Request
from fastapi.routing import APIRoute

from bitmill_service.http.problems import ProblemError


async def require_json(request: Request) -> None:
    """A dependency of every route below /v1; raises `ProblemError` `unsupported_media_type`."""
    route = request.scope["route"]
    assert isinstance(route, APIRoute)
    if route.body_field is None:
        return
    given = request.headers.get("content-type", "")
    media = given.partition(";")[0].strip().lower()
    if media == "application/json" or (
        media.startswith("application/") and media.endswith("+json")
    ):
        return
    raise ProblemError(
        "unsupported_media_type",
        f"the body has the type {given[:100]!r}" if given else "the body has no Content-Type",
        param="Content-Type",
    )
