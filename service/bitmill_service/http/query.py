"""Refuses query parameters that a route does not take, or takes once and got several times.

A misspelt `validate_only` would otherwise create the job that it was meant to try. Health and
metrics are asked by programs that add parameters of their own, and take any.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args, get_origin

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
    fields = dict(_fields(route.dependant))
    known = set(fields)
    for name in request.query_params:
        if name not in known:
            takes = ", ".join(sorted(known)) or "none"
            raise InputError(
                f"unknown query parameter {name[:80]!r}; this route takes: {takes}",
                code="invalid_request",
                param=name[:80],
            )

    for name, kind in fields.items():
        given = request.query_params.getlist(name)
        if len(given) > 1 and not _takes_several(kind):
            raise InputError(
                f"query parameter {name!r} stands {len(given)} times: give it once",
                code="invalid_request",
                param=name,
            )


def _takes_several(kind: Any) -> bool:
    return any(get_origin(one) is list for one in (kind, *get_args(kind)))


def _fields(dependant: Dependant) -> Iterator[tuple[str, Any]]:
    """Names and types of the query parameters."""
    yield from ((field.alias, field.field_info.annotation) for field in dependant.query_params)
    for inner in dependant.dependencies:
        yield from _fields(inner)
