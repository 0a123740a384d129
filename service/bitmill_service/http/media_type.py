"""Refuses bodies of another type than JSON where a route takes JSON, and names that stand twice.

curl's `-d` sends a form unless told otherwise; the answer has to say so, not that the body is no
object. Of a member that stands twice in an object Python's decoder would take the last.
"""

from __future__ import annotations

from fastapi import Request
from fastapi.routing import APIRoute

from bitmill.io import bounded_json
from bitmill_service.http.problems import ProblemError


async def require_json(request: Request) -> None:
    """A dependency of every route below /v1; raises `ProblemError` `unsupported_media_type`, or
    `malformed_request` for a member that stands twice."""
    route = request.scope["route"]
    assert isinstance(route, APIRoute)
    if route.body_field is None:
        return
    given = request.headers.get("content-type", "")
    media = given.partition(";")[0].strip().lower()
    if media == "application/json" or (
        media.startswith("application/") and media.endswith("+json")
    ):
        _refuse_repeated(await request.body())
        return
    raise ProblemError(
        "unsupported_media_type",
        f"the body has the type {given[:100]!r}" if given else "the body has no Content-Type",
        param="Content-Type",
    )


def _refuse_repeated(body: bytes) -> None:
    try:
        bounded_json.loads(body or b"null")
    except ValueError as error:
        raise ProblemError("malformed_request", f"the body is not JSON: {error}") from error
