"""Errors as RFC 9457 `application/problem+json`: one table from the error tree to HTTP.

    {"type": "urn:bitmill:error:<code>", "title", "status", "detail", "code", "param",
     "hint", "kind", "request_id"}

`code` is stable and meant for programs; `detail` names the value and the limit and may be
reworded; `hint` says what to do; `kind` is the class of an error of the layers below. A failure
that nobody planned answers 500 with code `internal` and the request id to look up in the log: a
stack trace never leaves the process.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DataError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from bitmill.errors import BitmillError, Cancelled, InputError, ResourceError, as_bitmill_error
from bitmill_workers.store.db import DATABASE_ERRORS

MEDIA_TYPE = "application/problem+json"

_STATUSES: tuple[tuple[type[BitmillError], int], ...] = (
    (InputError, 422),
    (ResourceError, 507),
    (Cancelled, 409),
    (BitmillError, 500),
)
"""The first class that fits wins. A code of `CODES` overrides it, but not for refused input: 422
tells a client that its request, not its timing or its path, has to change."""

CODES: Mapping[str, tuple[int, str]] = {
    "not_found": (404, "Check the id or path; list the collection to see what exists."),
    "method_not_allowed": (405, "Use one of the methods in the Allow header."),
    "not_acceptable": (406, "Ask for application/json or text/event-stream."),
    "malformed_request": (400, "Send a well-formed request; /docs shows an example."),
    "key_required": (401, "Send Authorization: Bearer KEY; `bitmill login` keeps a key for later."),
    "key_refused": (401, "Look at the key again, or ask the service's operator for a new one."),
    "hub_token_refused": (401, "Set HF_TOKEN to a key of this service, or unset it."),
    "scope_missing": (403, "Use a key with the scope that `detail` names."),
    "wrong_host": (421, "Use the address that `bitmill serve` printed, or set allowed_hosts."),
    "cross_origin": (403, "Call the service from a program, or from a page that it serves."),
    "payload_too_large": (413, "Send a smaller body."),
    "unsupported_media_type": (415, "Send Content-Type: application/json."),
    "precondition_failed": (412, "Look at the resource again; it is not the one you expect."),
    "range_not_satisfiable": (416, "Ask for a range within the size in Content-Range."),
    "job_not_found": (404, "List the jobs with GET /v1/jobs."),
    "sweep_not_found": (404, "List the sweeps with GET /v1/sweeps."),
    "sweep_not_finished": (409, "Wait until its jobs have finished, or cancel the sweep."),
    "no_plot_yet": (404, "Ask again when a cell of the sweep has succeeded."),
    "upload_not_found": (404, "List the uploads with GET /v1/uploads."),
    "upload_incomplete": (409, "Send the parts that GET /v1/uploads/{id} does not list."),
    "upload_complete": (409, "Nothing more to send; name the upload in a job."),
    "key_not_found": (404, "List the keys with GET /v1/keys."),
    "job_not_finished": (409, "Follow GET /v1/jobs/{id}/events until the job has finished."),
    "no_such_output": (404, "The job did not produce this; its `result` and `error` say why."),
    "job_finished": (409, "Nothing to cancel: the job has finished; DELETE removes it."),
    "state_conflict": (409, "Look at the job's state and try again."),
    "idempotency_mismatch": (422, "Use a new Idempotency-Key for a different request."),
    "idempotency_deleted": (409, "Use a new Idempotency-Key."),
    "store_unavailable": (503, "Try again soon; the server's log says what is wrong."),
    "storage_unavailable": (503, "Try again soon; the object store does not answer."),
    "stopping": (503, "Try again soon, when the service has started again."),
    "no_such_file": (404, "List the job's files with GET /v1/jobs/{id}/files."),
    "file_missing": (410, "The stored file is gone or damaged: retry the job."),
    "files_discarded": (410, "Retry the job; pin jobs whose files are to stay."),
    "profile_in_use": (409, "Cancel that job, or wait until it has ended."),
    "map_in_use": (409, "Cancel that job, or wait until it has ended."),
    "upload_in_use": (409, "Cancel that job, or wait until it has ended."),
    "job_in_use": (409, "Cancel that job, or wait until it has ended."),
    "profile_not_found": (404, "List the profiles with GET /v1/profiles."),
    "map_not_found": (404, "List the maps with GET /v1/bit-width-maps."),
    "hub_unreachable": (502, "Try again later, or check the server's HF_ENDPOINT."),
    "too_many_streams": (429, "Ask for pages of events, and for a stream again later."),
    "rate_limited": (429, "Wait as long as Retry-After says; follow a job by its event stream."),
    "quota_queued": (429, "Wait until some of your queued jobs have started, or cancel one."),
    "quota_bytes": (429, "Delete jobs or uploads that you no longer need."),
    "too_many_jobs": (429, "Wait until queued jobs have finished."),
    "internal": (500, "Report this with the request id; the server's log holds the cause."),
}

_HTTP_CODES = {
    400: "malformed_request",
    404: "not_found",
    405: "method_not_allowed",
    406: "not_acceptable",
    413: "payload_too_large",
    415: "unsupported_media_type",
    416: "range_not_satisfiable",
}

_QUOTA_WAIT_S = 60
"""A quota is freed by jobs that end and files that are deleted, which takes its time."""

_TITLES = {413: "Content Too Large", 416: "Range Not Satisfiable", 422: "Unprocessable Content"}
"""Of RFC 9110, where Python 3.11 has older ones."""

_log = logging.getLogger(__name__)


class ProblemError(Exception):
    """A refusal made by the HTTP layer itself; `code` must be a key of `CODES`."""

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status, self.hint = CODES[code]
        self.code, self.detail, self.param, self.headers = code, detail, param, headers


def status_and_hint(error: BitmillError) -> tuple[int, str]:
    """HTTP status and advice for a deliberate error of the layers below."""
    status, hint = CODES.get(error.code) or CODES.get(type(error).code) or CODES["internal"]
    if isinstance(error, InputError) or status == 500:
        status = next(status for kind, status in _STATUSES if isinstance(error, kind))
    return status, error.hint or hint


def problem_body(
    request: Request,
    *,
    status: int,
    code: str,
    detail: str,
    hint: str,
    param: str | None = None,
    kind: str | None = None,
) -> dict[str, Any]:
    """The members of a problem document."""
    return {
        "type": f"urn:bitmill:error:{code}",
        "title": _TITLES.get(status) or HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "code": code,
        "param": param,
        "hint": hint,
        "kind": kind,
        "request_id": getattr(request.state, "request_id", None),
    }


def _respond(
    request: Request, *, headers: Mapping[str, str] | None = None, **members: Any
) -> JSONResponse:
    """The answer that has these members of a problem document."""
    body = problem_body(request, **members)
    return JSONResponse(body, body["status"], headers=dict(headers or {}), media_type=MEDIA_TYPE)


def problem_response(request: Request, error: ProblemError) -> JSONResponse:
    """The answer that a refusal becomes."""
    return _respond(
        request,
        status=error.status,
        code=error.code,
        detail=error.detail,
        hint=error.hint,
        param=error.param,
        headers=error.headers,
    )


async def _on_problem(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ProblemError)
    return problem_response(request, error)


async def _on_bitmill_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, BitmillError)
    status, hint = status_and_hint(error)
    if status >= 500:
        _log.error("%s: %s", error.code, error.message)
    waits = {"Retry-After": str(_QUOTA_WAIT_S)} if status == 429 else None
    return _respond(
        request,
        status=status,
        code=error.code,
        detail=error.message,
        hint=hint,
        param=error.param,
        kind=error.to_dict()["kind"],
        headers=waits,
    )


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = _HTTP_CODES.get(error.status_code, "internal")
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(_allowed(request))
    return _respond(
        request,
        status=error.status_code,
        code=code,
        detail=f"{request.method} {request.url.path}: {error.detail}",
        hint=CODES[code][1],
        headers=headers,
    )


def _allowed(request: Request) -> list[str]:
    """The methods of all routes of this path; the router tells those of one route only."""
    return [
        method
        for method in ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
        if any(
            route.matches({**request.scope, "method": method})[0] is Match.FULL
            for route in request.app.routes
        )
    ]


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    """A body, query, header or path parameter that breaks a rule; the first one is named."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        status, code, where = 400, "malformed_request", "body"
        detail = f"the body is not JSON: {first['ctx']['error']} at byte {first['loc'][-1]}"
    else:
        status = 422
        code = "invalid_spec" if first["loc"][0] == "body" else "invalid_request"
        where = ".".join(str(part) for part in first["loc"][1:]) or str(first["loc"][0])
        detail = f"{where}: {first['msg'].removeprefix('Value error, ')}"
    return _respond(
        request,
        status=status,
        code=code,
        detail=detail,
        hint="Correct the parameter named in `param`; /docs lists every parameter.",
        param=where,
    )


async def _on_store_error(request: Request, error: Exception) -> JSONResponse:
    return store_response(request, error)


def store_response(request: Request, error: Exception) -> JSONResponse:
    """The answer where the job store failed, which the log says more about."""
    _log.error("the job store failed: %s", error)
    status, hint = CODES["store_unavailable"]
    return _respond(
        request,
        status=status,
        code="store_unavailable",
        detail="the job store does not answer, or cannot write",
        hint=hint,
        headers={"Retry-After": "5"},
    )


async def _on_unstorable(request: Request, error: Exception) -> JSONResponse:
    """PostgreSQL takes no NUL character in a text, which JSON and addresses can hold."""
    assert isinstance(error, DataError)
    _log.warning("a value cannot be stored: %s", error.orig)
    return _respond(
        request,
        status=422,
        code="invalid_request",
        detail="a value of the request cannot be stored, such as a text with a NUL character",
        hint="Correct the request as `detail` says.",
    )


async def _on_hang_up(request: Request, error: Exception) -> JSONResponse:
    """Nobody hears this answer: it is counted, and no fault of the server."""
    return _respond(
        request,
        status=400,
        code="malformed_request",
        detail="the connection ended before the whole body had come",
        hint=CODES["malformed_request"][1],
    )


async def _on_os_error(request: Request, error: Exception) -> JSONResponse:
    """A full disk, wherever it was met, is said; any other failure is a surprise."""
    met = as_bitmill_error(error)
    if isinstance(met, ResourceError):
        return await _on_bitmill_error(request, met)
    return await _on_surprise(request, error)


async def _on_surprise(request: Request, error: Exception) -> JSONResponse:
    request_id = getattr(request.state, "request_id", None)
    _log.error("request %s failed", request_id, exc_info=error)
    return _respond(
        request,
        status=500,
        code="internal",
        detail="the server failed on this request",
        hint=CODES["internal"][1],
        headers={"X-Request-ID": request_id} if request_id else None,
    )


HANDLERS: Mapping[type[Exception], Callable[[Request, Exception], Awaitable[JSONResponse]]] = {
    ProblemError: _on_problem,
    BitmillError: _on_bitmill_error,
    DataError: _on_unstorable,
    **dict.fromkeys(DATABASE_ERRORS, _on_store_error),
    ClientDisconnect: _on_hang_up,
    OSError: _on_os_error,
    HTTPException: _on_http_exception,
    RequestValidationError: _on_validation_error,
    Exception: _on_surprise,
}
"""What makes problem documents of exceptions."""


def install(app: FastAPI) -> None:
    """Register the handlers, so that every error answer of `app` is a problem document."""
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, handler)
