"""Sweeps: many jobs over a grid of settings, submitted, looked at and cancelled as one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Header, Path, Query, Response, status
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from bitmill.errors import InputError
from bitmill.io.atomic import sha256_json
from bitmill.reporting.sweep_table import SweepTable
from bitmill_service.api.admission import (
    admit_with,
    check_priority,
    looked_at,
    quota_of,
    refuse_when_full,
)
from bitmill_service.api.context import ID_PATTERN, Context, ContextDep, JobCursor, PrincipalDep
from bitmill_service.api.events import Position, stream_slot, sweep_events
from bitmill_service.api.routes.jobs import SUBMISSION, IdempotencyKey
from bitmill_service.api.sweep_views import sweep_line, sweep_view
from bitmill_service.http.access import Principal
from bitmill_service.http.openapi import CHANGES, JSON_BODY, refusals
from bitmill_service.http.problems import ProblemError
from bitmill_service.schemas import SweepPage, SweepView
from bitmill_workers.job_spec import JobSpec
from bitmill_workers.store.records import SweepRecord
from bitmill_workers.sweep_spec import Cell, SweepSpec, in_turn

router = APIRouter(prefix="/v1/sweeps", tags=["sweeps"])

SweepId = Annotated[str, Path(pattern=ID_PATTERN, description="Sweep id.")]
_FORMATS: dict[str, tuple[str, Callable[[SweepTable], str]]] = {
    "json": ("application/json", SweepTable.to_json),
    "csv": ("text/csv; charset=utf-8", SweepTable.to_csv),
    "markdown": ("text/markdown; charset=utf-8", SweepTable.to_markdown),
}
_TABLE = {
    "description": "The table in the format asked for.",
    "content": {
        "application/json": {"schema": {"type": "array", "items": {"type": "object"}}},
        "text/csv": {"schema": {"type": "string"}},
        "text/markdown": {"schema": {"type": "string"}},
    },
}
_EVENTS = {
    "description": "The stream; it ends with `event: end`.",
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
}
_PLOT = {
    "description": "The picture.",
    "content": {"image/svg+xml": {"schema": {"type": "string"}}},
}


@router.post(
    "",
    status_code=status.HTTP_202_ACCEPTED,
    response_model=SweepView,
    responses=refusals(*JSON_BODY, *SUBMISSION),
)
def create_sweep(
    spec: SweepSpec,
    context: ContextDep,
    caller: PrincipalDep,
    idempotency_key: IdempotencyKey = None,
    priority: Annotated[int, Query(ge=-100, le=100, description="Higher runs first.")] = 0,
) -> Response:
    """Submit a job for every cell of a grid, or none; the jobs share whatever stages are equal."""
    body = spec.model_dump(mode="json")
    request_hash = sha256_json({"sweep": body, "priority": priority})
    if idempotency_key is not None:
        known = context.sweeps.submitted(idempotency_key, request_hash, tenant=caller.tenant)
        if known is not None:
            return _accepted(context, known, replayed=True)
    check_priority(caller, priority)
    cells = tuple(in_turn(spec.cells()))
    refuse_when_full(context, len(cells))
    sweep, replayed = context.sweeps.submit(
        body,
        _admitted(context, cells, caller),
        label=spec.label,
        tenant=caller.tenant,
        idempotency_key=idempotency_key,
        request_hash=request_hash,
        priority=priority,
        created_by=caller.key_id,
        quota=quota_of(context, caller),
        keep_days=caller.limits.keep_days or context.settings.keep_days,
    )
    return _accepted(context, sweep, replayed=replayed)


@router.get("", response_model=SweepPage)
def list_sweeps(
    context: ContextDep,
    caller: PrincipalDep,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    after: Annotated[JobCursor | None, Query()] = None,
) -> SweepPage:
    """Sweeps, newest first, without their cells."""
    found = context.sweeps.list(tenant=caller.sees, limit=limit, after=after)
    states = context.sweeps.states([one.id for one in found])
    return SweepPage(
        sweeps=[sweep_line(one, states[one.id]) for one in found],
        next=found[-1].id if len(found) == limit else None,
    )


@router.get("/{sweep_id}", response_model=SweepView, responses=refusals("sweep_not_found"))
def get_sweep(sweep_id: SweepId, context: ContextDep, caller: PrincipalDep) -> SweepView:
    """One sweep and all of its cells, those that are not finished too."""
    return _view(context, sweep_id, caller)


def _sweep(sweep_id: SweepId, context: ContextDep, caller: PrincipalDep) -> SweepRecord:
    return context.sweeps.get(sweep_id, tenant=caller.sees)


@router.get(
    "/{sweep_id}/events",
    response_class=EventSourceResponse,
    responses=refusals("sweep_not_found", "too_many_streams") | {200: _EVENTS},
    dependencies=[Depends(stream_slot)],
)
async def stream_events(
    sweep: Annotated[SweepRecord, Depends(_sweep)],
    context: ContextDep,
    after: Annotated[
        str, Query(max_length=16_000, pattern=Position.PATTERN, description="`id:` last seen.")
    ] = "",
    last_event_id: Annotated[
        str | None, Header(max_length=16_000, pattern=Position.PATTERN)
    ] = None,
) -> AsyncIterator[ServerSentEvent]:
    """Events of all jobs of a sweep as they come, each with its `cell` and `job_id`."""
    seen = Position(after if last_event_id is None else last_event_id)
    poll_s = context.settings.event_poll_s
    async for event in sweep_events(context.sweeps, sweep.id, seen, poll_s, context.stopping):
        yield event


@router.get(
    "/{sweep_id}/table",
    response_class=Response,
    responses=refusals("sweep_not_found") | {200: _TABLE},
)
def get_table(
    sweep_id: SweepId,
    context: ContextDep,
    caller: PrincipalDep,
    format: Annotated[Literal["json", "csv", "markdown"], Query()] = "json",
) -> Response:
    """What the cells found, a line each."""
    media_type, write = _FORMATS[format]
    table = _view(context, sweep_id, caller).table
    return Response(write(table), media_type=media_type)


@router.get(
    "/{sweep_id}/plot",
    response_class=Response,
    responses=refusals("sweep_not_found", "no_plot_yet") | {200: _PLOT},
)
def get_plot(sweep_id: SweepId, context: ContextDep, caller: PrincipalDep) -> Response:
    """Size against perplexity, a line for every setting that is no budget."""
    picture = _view(context, sweep_id, caller).table.to_svg()
    if picture is None:
        raise ProblemError("no_plot_yet", f"no cell of sweep {sweep_id} has succeeded")
    return Response(picture, media_type="image/svg+xml")


@router.post(
    "/{sweep_id}/cancel",
    response_model=SweepView,
    responses=refusals(*CHANGES, "sweep_not_found"),
)
def cancel_sweep(sweep_id: SweepId, context: ContextDep, caller: PrincipalDep) -> SweepView:
    """Stop every job of a sweep that has not finished; repeating it is fine."""
    context.sweeps.request_cancel(sweep_id, tenant=caller.sees, by=caller.key_id)
    return _view(context, sweep_id, caller)


@router.delete(
    "/{sweep_id}",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=refusals(*CHANGES, "sweep_not_found", "sweep_not_finished", "job_in_use"),
)
def delete_sweep(sweep_id: SweepId, context: ContextDep, caller: PrincipalDep) -> None:
    """Remove a sweep whose jobs have all finished, with these jobs and their files."""
    context.sweeps.delete(sweep_id, tenant=caller.sees)


def _admitted(
    context: Context, cells: tuple[Cell, ...], caller: Principal
) -> list[tuple[int, JobSpec, str]]:
    """Number, specification and queue of every cell; raises what is wrong with the first one."""
    found = []
    with looked_at(context, caller) as models:
        for cell in cells:
            try:
                admission = admit_with(models, context, cell.spec, caller)
            except InputError as error:
                error.add(f"asked for by {cell.name}")
                raise
            found.append((cell.number, cell.spec, admission.queue))
    return found


def _view(context: Context, sweep_id: str, caller: Principal) -> SweepView:
    sweep = context.sweeps.get(sweep_id, tenant=caller.sees)
    return sweep_view(sweep, context.sweeps.cells(sweep.id))


def _accepted(context: Context, sweep: SweepRecord, *, replayed: bool) -> Response:
    jobs = context.sweeps.cells(sweep.id)
    if not replayed:
        for job in jobs.values():
            context.notify(job.id, job.queue)
    view = sweep_view(sweep, jobs)
    headers = {"Location": view.links.self}
    if replayed:
        headers["Idempotency-Replayed"] = "true"
    return JSONResponse(view.model_dump(mode="json"), status.HTTP_202_ACCEPTED, headers=headers)
