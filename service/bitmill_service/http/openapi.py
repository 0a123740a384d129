"""The API's description: what FastAPI cannot tell by itself.

Every answer of a route is declared, refusals by the codes that cause them, so that a client or a
test finds an answer that nobody documented.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from bitmill_service.http.access import needed_scope
from bitmill_service.http.problems import CODES, MEDIA_TYPE
from bitmill_service.schemas import Problem

_PROBLEM = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
_UNUSABLE = "The request, or what it names, cannot be used; `code` says why, `param` where."
_NO_ROOM = "`disk_full` and the like: the server has no room for this."

Responses = dict[int | str, dict[str, Any]]

CHANGES = ("cross_origin",)
"""Codes of a route that changes something."""

JSON_BODY = (*CHANGES, "payload_too_large", "unsupported_media_type")
"""Codes of a route that takes JSON."""

_KEYED = ("key_required", "key_refused", "hub_token_refused", "scope_missing", "rate_limited")
"""Codes of a route that needs a key."""

_EVERYWHERE = ("malformed_request", "wrong_host", "internal", "store_unavailable")


def refusals(*codes: str) -> Responses:
    """The refusals of a route: these codes of `problems.CODES`, and those of every route."""
    by_status: dict[int, list[str]] = {}
    for code in (*_EVERYWHERE, *codes):
        by_status.setdefault(CODES[code][0], []).append(f"`{code}`")
    told = {status: ", ".join(found) for status, found in by_status.items()}
    told |= {422: _UNUSABLE, 507: _NO_ROOM}
    return {
        status: {"description": text, "content": _PROBLEM} for status, text in sorted(told.items())
    }


def describe(app: FastAPI) -> None:
    """Let `app.openapi()` also say what its types cannot: keys, problems, budgets and the like."""
    plain: Callable[[], dict[str, Any]] = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            described = plain()
            _require_keys(described)
            schemas = described["components"]["schemas"]
            schemas["Problem"] = Problem.model_json_schema()
            _exactly_one(schemas["Budget"])
            _widths_as_digits(schemas["BitWidthMap"])
            _require_discriminators(schemas)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _require_keys(described: dict[str, Any]) -> None:
    """Every call says which scope its key needs, and what it answers without."""
    described["components"]["securitySchemes"] = {
        "key": {
            "type": "http",
            "scheme": "bearer",
            "bearerFormat": "bm_<id>_<secret>_<checksum>",
            "description": "An API key, made by `bitmill keys create`. A service on loopback asks "
            "for none until the first key is made.",
        }
    }
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            scope = needed_scope(method.upper(), path)
            if scope is None:
                continue
            operation["security"] = [{"key": [scope]}]
            answers = operation["responses"]
            for status, answer in refusals(*_KEYED).items():
                known = answers.setdefault(str(status), answer)
                if str(status) in ("403", "429") and known is not answer:
                    known["description"] += f", {answer['description']}"
            operation["responses"] = dict(sorted(answers.items()))


def _widths_as_digits(schema: dict[str, Any]) -> None:
    """Widths are written as one digit a group, and read as a list of numbers as well."""
    linears = schema["properties"]["linears"]
    digits = {"type": "string", "pattern": "^[0-9]+$"}
    linears["additionalProperties"] = {"anyOf": [digits, linears["additionalProperties"]]}


def _exactly_one(schema: dict[str, Any]) -> None:
    """One of the members is given, and not null."""
    schema["oneOf"] = [
        {"required": [name], "properties": {name: {"type": "number"}}}
        for name in schema["properties"]
    ]


def _require_discriminators(schemas: dict[str, Any]) -> None:
    """A type that is chosen by a member needs it, whatever its default is."""
    for found in _objects(schemas):
        chosen = found.get("discriminator", {})
        for reference in chosen.get("mapping", {}).values():
            member = schemas[reference.rpartition("/")[2]]
            required = {chosen["propertyName"], *member.get("required", ())}
            member["required"] = sorted(required)


def _objects(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, list):
        return [found for item in value for found in _objects(item)]
    if not isinstance(value, dict):
        return []
    return [value, *(found for item in value.values() for found in _objects(item))]
