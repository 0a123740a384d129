"""Is the process up, can it take jobs, what has it been doing, and how is it called."""

from __future__ import annotations

import logging
import os
import shutil
from importlib.metadata import version
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from bitmill.errors import BitmillError
from bitmill.io.targets import existing
from bitmill_service.api.context import Context, ContextDep
from bitmill_service.http.docs_page import POLICY, docs_page
from bitmill_service.schemas import Health, Readiness
from bitmill_workers.store.db import DATABASE_ERRORS
from bitmill_workers.store.migrate import require_head

router = APIRouter(tags=["health"])
_log = logging.getLogger(__name__)

VERSION = version("bitmill")
LEAST_FREE_BYTES = 64 << 20
"""Below this the data folder counts as full: requests of 16 MiB, parts of uploads of 8 MiB and what
the database writes beside them come several at once."""


@router.get("/healthz", response_model=Health)
async def healthz() -> Health:
    """The process answers."""
    return Health(status="ok", version=VERSION)


@router.get("/readyz", response_model=Readiness, responses={503: {"model": Readiness}})
def readyz(context: ContextDep) -> Response:
    """200 where jobs can be taken: a database of the right version that answers, room in the data
    folder, and an object store that answers where one is configured. Each check that failed says
    why. Workers are reported only."""
    needed = {"database": _database(context), "disk": _disk(context.settings.data)}
    if context.settings.s3_bucket is not None:
        needed["storage"] = _storage(context)
    ready = set(needed.values()) == {"ok"}
    workers = _workers(context) if needed["database"] == "ok" else "unknown"
    body = Readiness(ready=ready, checks=needed | {"workers": workers})
    return JSONResponse(body.model_dump(), 200 if ready else 503)


def _database(context: Context) -> str:
    try:
        require_head(context.database)
    except BitmillError as error:
        return error.message
    except DATABASE_ERRORS as error:
        return _away(error)
    return "ok"


def _away(error: Exception) -> str:
    _log.warning("not ready, the job store failed: %s", error)
    return "the database does not answer; the service's log says more"


def _disk(data: Path) -> str:
    folder = existing(data)
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE_BYTES:
        return (
            f"{free / 2**20:.0f} MiB are free in the data folder, {LEAST_FREE_BYTES >> 20} MiB are "
            "needed: free some disk space, `bitmill prune` lets old files go"
        )
    if not os.access(folder, os.W_OK):
        return "the data folder cannot be written to"
    return "ok"


def _storage(context: Context) -> str:
    try:
        context.artifacts.check()
    except BitmillError:
        return "the object store does not answer, or refuses; the service's log says more"
    return "ok"


def _workers(context: Context) -> str:
    try:
        live = context.catalog.workers()
        waiting = context.jobs.waiting()
    except BitmillError as error:
        return error.message
    except DATABASE_ERRORS as error:
        return _away(error)
    if live:
        return f"{len(live)} live"
    return f"none live, {waiting} jobs wait: start one with `bitmill worker`"


@router.get("/docs", include_in_schema=False)
def docs(request: Request) -> Response:
    """The API's description for people."""
    page = docs_page(request.app.openapi())
    return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})


@router.get("/metrics", include_in_schema=False)
def metrics(context: ContextDep) -> Response:
    """Counters and gauges in Prometheus' text format."""
    return Response(generate_latest(context.registry), media_type=CONTENT_TYPE_LATEST)
