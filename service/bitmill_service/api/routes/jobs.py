"""Jobs: create, plan, list, look at, cancel, retry, delete."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated

from fastapi import APIRouter, Header, Query, Response, status
from pydantic import BaseModel

from bitmill.errors import InputError
from bitmill.io.atomic import sha256_json
from bitmill_service.api.admission import (
    admit,
    check_priority,
    plan_view,
    quota_of,
    refuse_when_full,
)
from bitmill_service.api.context import (
    ID_PATTERN,
    Context,
    ContextDep,
    JobCursor,
    JobDep,
    JobId,
    PrincipalDep,
)
from bitmill_service.api.exporting import plan_export
from bitmill_service.api.views import job_links, job_view
from bitmill_service.api.waiting import waiting
from bitmill_service.http.access import Principal
from bitmill_service.http.openapi import CHANGES, JSON_BODY, refusals
from bitmill_service.http.problems import ProblemError
from bitmill_service.schemas import JobPage, JobView, PlanView
from bitmill_workers.job_spec import AnySpec, ExportSpec, JobKind, JobSpec, PushSpec, parse_stored
from bitmill_workers.messaging.webhooks import check_webhook_url
from bitmill_workers.settings import TIERS
from bitmill_workers.store.jobs import Seen
from bitmill_workers.store.records import JobRecord
from bitmill_workers.store.states import ShownState

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

SUBMISSION = (
    *("idempotency_deleted", "too_many_jobs", "quota_queued", "quota_bytes"),
    *("hub_unreachable", "storage_unavailable"),
)

IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        pattern=r"^[\x21-\x7e]+$",
        description="The same key with the same body gives the same job for 24 hours.",
    ),
]


ValidateOnly = Annotated[bool, Query(description="Answer with the plan and create nothing.")]


def shown(context: Context, job: JobRecord) -> JobView:
    """The job as clients see it, with its place in the queue and its webhook."""
    return _view(context.jobs.seen_of(job))


def _view(seen: Seen) -> JobView:
    return job_view(seen.job, **waiting(seen.job, seen.queues), delivery=seen.delivery)


@router.post(
    "",
    status_code=status.HTTP_202_ACCEPTED,
    response_model=JobView,
    responses=refusals(*JSON_BODY, *SUBMISSION)
    | {200: {"model": PlanView, "description": "The plan; `validate_only` was set."}},
)
def create_job(
    spec: JobSpec,
    context: ContextDep,
    caller: PrincipalDep,
    idempotency_key: IdempotencyKey = None,
    validate_only: ValidateOnly = False,
    priority: Annotated[int, Query(ge=-100, le=100, description="Higher runs first.")] = 0,
    webhook_url: Annotated[
        str | None, Header(description="Told by a signed POST when the job has ended.")
    ] = None,
) -> Response:
    """Submit a job. A replayed key answers with the first call's job and `Idempotency-Replayed`."""
    if validate_only:
        return _json(plan_view(admit(context, spec, caller)))
    asked = {"spec": spec.model_dump(mode="json"), "priority": priority, "webhook": webhook_url}
    request_hash = sha256_json(asked)
    if found := replayed(context, idempotency_key, request_hash, tenant=caller.tenant):
        return found
    if webhook_url is not None:
        check_webhook_url(webhook_url, context.settings)
    check_priority(caller, priority)
    refuse_when_full(context)
    submission = context.jobs.submit(
        spec,
        tenant=caller.tenant,
        idempotency_key=idempotency_key,
        request_hash=request_hash,
        queue=admit(context, spec, caller).queue,
        priority=priority,
        webhook_url=webhook_url,
        created_by=caller.key_id,
        quota=quota_of(context, caller),
        keep_days=caller.limits.keep_days or context.settings.keep_days,
    )
    return accepted(context, submission.job, replayed=submission.replayed)


@router.get("", response_model=JobPage)
def list_jobs(
    context: ContextDep,
    caller: PrincipalDep,
    state: Annotated[ShownState | None, Query()] = None,
    model: Annotated[
        str | None, Query(max_length=4200, description="Part of the model's name, any case.")
    ] = None,
    label: Annotated[
        str | None, Query(max_length=200, description="Part of the label, any case.")
    ] = None,
    profile: Annotated[
        str | None, Query(pattern=ID_PATTERN, description="Jobs that used this profile.")
    ] = None,
    kind: Annotated[JobKind | None, Query()] = None,
    parent_id: Annotated[str | None, Query(pattern=ID_PATTERN)] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    after: Annotated[JobCursor | None, Query()] = None,
) -> JobPage:
    """Jobs, newest first; `next` of a page is `after` of the following one."""
    page = context.jobs.list(
        tenant=caller.sees,
        state=state,
        model=model,
        label=label,
        profile=profile,
        kind=kind,
        parent_id=parent_id,
        limit=limit,
        after=after,
    )
    queues = context.jobs.queues(page.jobs)
    return JobPage(
        jobs=[job_view(job, **waiting(job, queues)) for job in page.jobs], next=page.after
    )


@router.get("/{job_id}", response_model=JobView, responses=refusals("job_not_found"))
def get_one(job_id: JobId, context: ContextDep, caller: PrincipalDep) -> Response:
    """One job: state, stage, progress, estimate, error, result and links."""
    # Asked most often of all: one thread, one transaction, and no second look at the answer.
    return _json(_view(context.jobs.seen(job_id, tenant=caller.sees)))


@router.post(
    "/{job_id}/cancel",
    response_model=JobView,
    responses=refusals(*CHANGES, "job_not_found", "job_finished", "state_conflict"),
)
def cancel_job(job_id: JobId, context: ContextDep, caller: PrincipalDep) -> JobView:
    """Stop a job. A running one shows `cancelling` until its runner is gone; repeating is fine."""
    asked = context.jobs.request_cancel(job_id, tenant=caller.sees, by=caller.key_id)
    return shown(context, asked)


@router.post(
    "/{job_id}/retry",
    status_code=status.HTTP_202_ACCEPTED,
    response_model=JobView,
    responses=refusals(*CHANGES, *SUBMISSION, "job_not_found", "job_not_finished"),
)
def retry_job(
    job: JobDep,
    context: ContextDep,
    caller: PrincipalDep,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Submit a finished job's specification again, as a new job with `parent_id`.

    An export has the job that it is made from for its parent, tried again too.
    """
    if not job.finished:
        raise ProblemError(
            "job_not_finished",
            f"job {job.id} is {job.shown_state}: only a finished job can be retried",
        )
    request_hash = sha256_json({"retry": job.id})
    if found := replayed(context, idempotency_key, request_hash, tenant=job.tenant):
        return found
    check_priority(caller, job.priority)
    refuse_when_full(context)
    spec = parse_stored(job.kind, job.spec)
    if job.webhook_url is not None:
        check_webhook_url(job.webhook_url, context.settings)
    _admit_again(context, spec, caller)
    submission = context.jobs.submit(
        spec,
        tenant=job.tenant,
        idempotency_key=idempotency_key,
        request_hash=request_hash,
        queue=job.queue,
        priority=job.priority,
        parent_id=job.id if isinstance(spec, JobSpec) else job.parent_id,
        cell=None if job.sweep_id is None or job.cell is None else (job.sweep_id, job.cell),
        webhook_url=job.webhook_url,
        created_by=caller.key_id,
        quota=quota_of(context, caller),
        keep_days=caller.limits.keep_days or context.settings.keep_days,
    )
    return accepted(context, submission.job, replayed=submission.replayed)


def _admit_again(context: Context, spec: AnySpec, caller: Principal) -> None:
    match spec:
        case JobSpec():
            admit(context, spec, caller)
        case ExportSpec():
            plan_export(context, context.jobs.get(spec.job_id, tenant=caller.sees), spec)
        case PushSpec():
            raise InputError(
                "the token of a push is erased when it ends: push again with a token",
                code="push_token_lost",
                hint=f"POST /v1/jobs/{spec.job_id}/push",
            )


@router.post("/{job_id}/pin", response_model=JobView, responses=refusals(*CHANGES, "job_not_found"))
def pin_job(job_id: JobId, context: ContextDep, caller: PrincipalDep) -> JobView:
    """Keep the job's files whatever their age; repeating it is fine."""
    pinned = context.jobs.pin(job_id, True, tenant=caller.sees, by=caller.key_id)
    return shown(context, pinned)


@router.post(
    "/{job_id}/unpin", response_model=JobView, responses=refusals(*CHANGES, "job_not_found")
)
def unpin_job(job_id: JobId, context: ContextDep, caller: PrincipalDep) -> JobView:
    """Let the job's files go when their time is over; repeating it is fine."""
    unpinned = context.jobs.pin(job_id, False, tenant=caller.sees, by=caller.key_id)
    return shown(context, unpinned)


@router.delete(
    "/{job_id}",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=refusals(*CHANGES, "job_not_found", "job_not_finished", "job_in_use"),
)
def delete_job(job_id: JobId, context: ContextDep, caller: PrincipalDep) -> None:
    """Remove a finished job with its events, log and files, which no unfinished job may need."""
    context.jobs.delete(job_id, tenant=caller.sees)


def replayed(
    context: Context, key: str | None, request_hash: str, *, tenant: str
) -> Response | None:
    """The answer to a repeated request, None to a new one.

    Looked up before anything is checked: a queue that has filled up since, or a model that is
    gone, must not make a job that exists look refused.
    """
    job = None if key is None else context.jobs.submitted(key, request_hash, tenant=tenant)
    return None if job is None else accepted(context, job, replayed=True)


def follow(
    context: Context,
    caller: Principal,
    job: JobRecord,
    spec: ExportSpec | PushSpec,
    *,
    idempotency_key: str | None,
    request_hash: str,
    keep_days: float | None = None,
    sealed: Callable[[str], bytes] | None = None,
) -> Response:
    """The answer to a new job that works on the files of `job`; sealed: as of `JobStore.submit`."""
    refuse_when_full(context)
    submission = context.jobs.submit(
        spec,
        tenant=job.tenant,
        idempotency_key=idempotency_key,
        request_hash=request_hash,
        queue=TIERS[0],
        priority=job.priority,
        parent_id=job.id,
        created_by=caller.key_id,
        quota=quota_of(context, caller),
        keep_days=keep_days,
        sealed=sealed,
    )
    return accepted(context, submission.job, replayed=submission.replayed)


def accepted(context: Context, job: JobRecord, *, replayed: bool) -> Response:
    """The answer to a submission; a new job is told to the workers."""
    if not replayed:
        context.notify(job.id, job.queue)
    headers = {"Location": job_links(job.id).self}
    if replayed:
        headers["Idempotency-Replayed"] = "true"
    return _json(shown(context, job), status.HTTP_202_ACCEPTED, headers)


def _json(
    view: BaseModel, status_code: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    body = view.model_dump_json()
    return Response(body, status_code, headers, media_type="application/json")
