"""What a job leaves: events, log, bit-width map, quality report, files."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import StringConstraints

from bitmill.config.bit_width_map import MAP_NAME, BitWidthMap
from bitmill.errors import InputError
from bitmill.reporting.summary import SUMMARY_NAME, ProfileSummary
from bitmill.results import QUALITY_NAME, QualityReport
from bitmill_service.api.context import Context, ContextDep, JobDep, PrincipalDep, require_success
from bitmill_service.api.events import EventStreamRoute, check_seen, job_events, stream_slot
from bitmill_service.api.files import (
    OTHER_TYPE,
    TYPES,
    StoredFile,
    elsewhere_response,
    file_response,
    relayed_response,
)
from bitmill_service.api.group_arrays import ARRAYS, MEDIA_TYPE, job_groups
from bitmill_service.api.reallocation import open_profile
from bitmill_service.api.views import event_view, file_view, log_view
from bitmill_service.http.openapi import Responses, refusals
from bitmill_service.http.problems import ProblemError
from bitmill_service.schemas import EventPage, FileList, LogPage
from bitmill_workers.execution.inputs import published_map
from bitmill_workers.store.records import Artifact, JobRecord

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["job outputs"])
streams = APIRouter(prefix="/v1/jobs/{job_id}", route_class=EventStreamRoute)

_OF_FINISHED = (
    *("job_not_found", "no_such_output", "no_such_file"),
    *("job_not_finished", "file_missing", "files_discarded", "storage_unavailable"),
)
_BYTES = {
    "content": {
        OTHER_TYPE: {"schema": {"type": "string", "format": "binary"}},
        **{kind: {"schema": {"type": "string"}} for kind in TYPES.values()},
        "application/json": {"schema": {}},
    }
}
_FILE: Responses = refusals(*_OF_FINISHED, "precondition_failed", "range_not_satisfiable") | {
    200: {"description": "The whole file.", **_BYTES},
    304: {"description": "It is the one that `If-None-Match` names, or is not newer."},
}
_FILE_PART: Responses = {
    206: {"description": "The part that `Range` names.", **_BYTES},
    302: {"description": "The file lies in an object store, at a signed address."},
}

EventKind = Annotated[str, StringConstraints(pattern=r"^[a-z_]{1,32}$")]
After = Annotated[int, Query(ge=0, lt=2**62, description="Number of the last event seen.")]


async def _last_seen(
    job: JobDep,
    after: After = 0,
    last_event_id: Annotated[int | None, Header(ge=0, lt=2**62)] = None,
) -> int:
    return check_seen(job, after if last_event_id is None else last_event_id)


@streams.get(
    "/events",
    response_class=EventSourceResponse,
    include_in_schema=False,
    dependencies=[Depends(stream_slot)],
)
async def stream_events(
    job: JobDep, context: ContextDep, start: Annotated[int, Depends(_last_seen)]
) -> AsyncIterator[ServerSentEvent]:
    """The events as they come; ends with `event: end` when the job has finished."""
    poll_s = context.settings.event_poll_s
    async for event in job_events(context.jobs, job.id, start, poll_s, context.stopping):
        yield event


@router.get(
    "/events",
    response_model=EventPage,
    responses=refusals("job_not_found", "too_many_streams")
    | {
        200: {
            "description": "A page; with `Accept: text/event-stream` a stream, which takes "
            "`Last-Event-ID` and ends with `event: end`.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        }
    },
)
def page_events(
    job: JobDep,
    context: ContextDep,
    after: After = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 500,
    kind: Annotated[
        list[EventKind] | None, Query(max_length=16, description="Only events of these kinds.")
    ] = None,
) -> EventPage:
    """Events after `after`, oldest first."""
    check_seen(job, after)
    events = context.jobs.events(job.id, after=after, limit=limit, kinds=kind)
    last = events[-1].seq if events else after
    if len(events) < limit:
        last = max(last, job.next_seq - 1)
    return EventPage(
        events=[event_view(event) for event in events],
        next_after=last,
        end=job.finished and last >= job.next_seq - 1,
    )


@router.get("/logs", response_model=LogPage, responses=refusals("job_not_found"))
def read_logs(
    job: JobDep,
    context: ContextDep,
    offset: Annotated[int, Query(ge=0, lt=2**62)] = 0,
) -> LogPage:
    """The runner's log from byte `offset`."""
    page = context.jobs.read_log(job.id, offset=offset)
    if offset > page.size:
        raise InputError(
            f"offset={offset}: the log of job {job.id} has {page.size} bytes",
            code="invalid_request",
            param="offset",
        )
    return log_view(page, finished=job.finished)


@router.get("/bit-width-map", response_model=BitWidthMap, responses=refusals(*_OF_FINISHED))
def read_map(job: JobDep, context: ContextDep) -> Response:
    """The width of every group of every quantized linear, and the model that it was made for."""
    data = _read(context, job, MAP_NAME)
    found = published_map(job.id, data, context.jobs, context.artifacts)
    return Response(found.to_json(), media_type="application/json")


@router.get(
    "/groups",
    response_class=Response,
    responses=refusals(*_OF_FINISHED) | {200: ARRAYS},
)
def read_groups(job: JobDep, context: ContextDep, caller: PrincipalDep) -> Response:
    """Width, bytes, error and sensitivity of every group as typed arrays, in a safetensors file.

    `names` (u8, a JSON list), `starts` (i32 [L+1]) and `widths` (u8 [T]) are always there;
    `shapes` (i32 [L, 2]) and `bytes` (i32 [T]) where the job's profile is stored; `error`
    (f32 [L]), `sensitivity` (f32 [T]), `predicted_loss` (f32 [L]) and `reference_width` (i32 [1])
    where they were measured.
    """
    found = BitWidthMap.model_validate_json(_read(context, job, MAP_NAME))
    report = QualityReport.model_validate_json(_read(context, job, QUALITY_NAME))
    summary = None
    if context.jobs.artifact(job.id, SUMMARY_NAME) is not None:
        summary = ProfileSummary.model_validate_json(_read(context, job, SUMMARY_NAME))
    plan = None
    if job.profile_id and context.catalog.profile(job.profile_id, tenant=caller.sees):
        plan = open_profile(context, caller, job.profile_id).model.plan
    return Response(job_groups(found, report, summary, plan), media_type=MEDIA_TYPE)


@router.get("/report", responses=refusals(*_OF_FINISHED))
def read_report(job: JobDep, context: ContextDep) -> Response:
    """The quality report: perplexity and KL against the source, with standard errors."""
    return Response(_read(context, job, QUALITY_NAME), media_type="application/json")


@router.get("/files", response_model=FileList, responses=refusals(*_OF_FINISHED))
def list_files(job: JobDep, context: ContextDep) -> FileList:
    """All published files with sizes and SHA-256."""
    require_success(job)
    files = context.jobs.artifacts(job.id)
    return FileList(
        job_id=job.id,
        files=[file_view(job.id, file) for file in files],
        total_size=sum(file.size for file in files),
    )


def find_file(path: str, job: JobDep, context: ContextDep) -> Artifact:
    """The published file of this exact path: membership in the job's list, never a join."""
    require_success(job)
    return _published(context, job, path)


@router.get("/files/{path:path}", response_class=Response, responses=_FILE | _FILE_PART)
@router.head("/files/{path:path}", response_class=Response, responses=_FILE)
def read_file(
    request: Request, context: ContextDep, file: Annotated[Artifact, Depends(find_file)]
) -> Response:
    """A file's bytes; takes `Range`, `If-Range` and conditions. The ETag is the SHA-256."""
    return send_file(request, context, file)


def send_file(request: Request, context: Context, file: Artifact) -> Response:
    """The answer to GET or HEAD of a published file, wherever it lies."""
    place = context.artifacts.local_path(file)
    if place is None:
        asked = (file.path, file.size, file.sha256, request.method, request.headers)
        if not context.settings.s3_redirect:
            return relayed_response(*asked, partial(context.artifacts.read_part, file))

        def address() -> str:
            found = context.artifacts.url(file)
            assert found is not None
            return found

        return elsewhere_response(*asked, address)
    stored = StoredFile(place, file.path, file.size, file.sha256)
    inside, location = context.settings.accel_location, None
    if inside is not None:
        location = inside + place.relative_to(context.settings.artifacts_folder).as_posix()
    return file_response(stored, request.method, request.headers, location)


def _published(context: Context, job: JobRecord, path: str) -> Artifact:
    found = context.jobs.artifact(job.id, path)
    if found is None:
        raise ProblemError("no_such_file", f"job {job.id} has no file {path!r}", param="path")
    return found


def _read(context: Context, job: JobRecord, name: str) -> bytes:
    require_success(job)
    file = _published(context, job, name)
    try:
        return context.artifacts.read(file)
    except FileNotFoundError as error:
        raise ProblemError("file_missing", f"{name} is no longer stored") from error
