"""Refuses query parameters that a route does not take.

A misspelt `validate_only` would otherwise create the job that it was meant to try. Health and
metrics are asked by programs that add parameters of their own, and take any.
"""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import Request
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from bitmill.errors import InputError


async def refuse_unknown_query(request: Request) -> None:
    """A dependency of every route below /v1; raises `InputError` (code `invalid_request`)."""
    route = request.scope["route"]
    assert isinstance(route, APIRoute)
    if not request.query_params:
        return
    known = set(_names(route.dependant))
    for name in request.query_params:
        if name not in known:
            takes = ", ".join(sorted(known)) or "none"
            raise InputError(
                f"unknown query parameter {name[:80]!r}; this route takes: {takes}",
                code="invalid_request",
                param=name[:80],
            )


def _names(dependant: Dependant) -> Iterator[str]:
    yield from (field.alias for field in dependant.query_params)
    for inner in dependant.dependencies:
        yield from _names(inner)
