"""One job: how far it is, what it said, what it left, and what can be done with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import RedirectResponse

from bitmill.pipeline.progress import STAGES
from bitmill_service.api.context import ID_PATTERN, ContextDep, JobDep, JobId, PrincipalDep
from bitmill_service.api.routes import job_outputs as outputs
from bitmill_service.api.routes import jobs as api
from bitmill_service.http.access import PAGES
from bitmill_service.pages.rendering import render
from bitmill_service.schemas import EventView, JobView

LOG_BYTES = 16_000
_KINDS = ["stage", "state", "warning", "attempt", "cancel_requested"]

router = APIRouter()


@dataclass(frozen=True)
class Step:
    """One stage on the way. state: "waiting", "started", "skipped", "finished", and of a job
    that has ended, "stopped" or "unused"."""

    name: str
    state: str = "waiting"
    seconds: float | None = None


@router.get("/jobs/{job_id}")
def show_job(
    request: Request,
    job: JobDep,
    context: ContextDep,
    caller: PrincipalDep,
    against: Annotated[str | None, Query(pattern=ID_PATTERN)] = None,
) -> Response:
    """The page of a job; `against`: with the difference to this job's specification."""
    shown = api.shown(context, job)
    page = outputs.page_events(job, context, limit=1000, kind=_KINDS)
    log = outputs.read_logs(job, context, offset=max(0, job.log_size - LOG_BYTES))
    has_files = job.state == "succeeded" and job.discarded_at is None
    other = None if against is None else context.jobs.get(against, tenant=caller.sees)
    return render(
        request,
        "job.html",
        job=shown,
        steps=timeline(shown, page.events),
        warnings=[
            event.data.get("message", "") for event in page.events if event.kind == "warning"
        ],
        last_event=page.next_after,
        log=log.text if log.offset == 0 else log.text.partition("\n")[2],
        log_is_whole=log.offset == 0,
        files=outputs.list_files(job, context) if has_files else None,
        address=f"{request.url.scheme}://{request.url.netloc}",
        against=against,
        differences=None if other is None else differences(shown.spec, other.spec),
    )


@router.post("/jobs/{job_id}/cancel")
def cancel(job_id: JobId, context: ContextDep, caller: PrincipalDep) -> Response:
    """Stop the job."""
    api.cancel_job(job_id, context, caller)
    return RedirectResponse(f"{PAGES}/jobs/{job_id}", 303)


@router.post("/jobs/{job_id}/retry")
def retry(job: JobDep, context: ContextDep, caller: PrincipalDep) -> Response:
    """Submit the same specification as a new job, and show that."""
    answer = api.retry_job(job, context, caller)
    return RedirectResponse(PAGES + answer.headers["location"].removeprefix("/v1"), 303)


def timeline(job: JobView, events: Sequence[EventView]) -> list[Step]:
    """The stages in order, each as far as these events say; a stage may be tried several times."""
    steps = {name: Step(name) for name in STAGES}
    began = {}
    for event in events:
        name, state = event.data.get("stage"), event.data.get("state")
        if event.kind != "stage" or name not in steps:
            continue
        if state == "started":
            began[name] = event.at
        spent = (event.at - began[name]).total_seconds() if name in began else None
        done = state == "finished"
        steps[name] = Step(name, str(state), spent if done else None)
    if job.kind != "quantize":  # which take few of the stages
        steps = {name: step for name, step in steps.items() if step.state != "waiting"}
    if job.terminal:
        ends = {"started": "stopped", "waiting": "unused"}
        return [replace(step, state=ends.get(step.state, step.state)) for step in steps.values()]
    return list(steps.values())


def differences(spec: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Members that two specifications do not share: path, ours, theirs; None where absent."""
    ours, theirs = _flat(spec), _flat(other)
    names = sorted(ours.keys() | theirs.keys())
    pairs = ((name, ours.get(name), theirs.get(name)) for name in names)
    return [pair for pair in pairs if pair[1] != pair[2]]


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {path: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{path}.{key}" if path else str(key))
    return found
