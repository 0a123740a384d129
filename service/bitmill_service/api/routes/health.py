"""Is the process up, can it take jobs, what has it been doing, and how is it called."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from bitmill.errors import BitmillError
from bitmill_service.api.context import Context, ContextDep
from bitmill_service.http.docs_page import POLICY, docs_page
from bitmill_service.schemas import Health, Readiness
from bitmill_workers.store.migrate import require_head

router = APIRouter(tags=["health"])

VERSION = version("bitmill")


@router.get("/healthz", response_model=Health)
async def healthz() -> Health:
    """The process answers."""
    return Health(status="ok", version=VERSION)


@router.get("/readyz", response_model=Readiness, responses={503: {"model": Readiness}})
def readyz(context: ContextDep) -> Response:
    """200 where jobs can be taken: database of the right version. Workers are reported only."""
    checks = {"database": _database(context), "workers": _workers(context)}
    ready = checks["database"] == "ok"
    body = Readiness(ready=ready, checks=checks)
    return JSONResponse(body.model_dump(), 200 if ready else 503)


def _database(context: Context) -> str:
    try:
        require_head(context.database)
    except BitmillError as error:
        return error.message
    return "ok"


def _workers(context: Context) -> str:
    try:
        live = context.catalog.workers()
        waiting = context.jobs.waiting()
    except BitmillError as error:
        return error.message
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
