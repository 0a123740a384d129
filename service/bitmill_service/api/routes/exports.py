"""Exports of a finished job: jobs of their own, of kind `export`, with `parent_id`."""

from __future__ import annotations

from fastapi import APIRouter, Response, status
from fastapi.responses import JSONResponse

from bitmill.formats.export_plan import ExportTarget
from bitmill.io.atomic import sha256_json
from bitmill_service.api.context import ContextDep, JobDep, PrincipalDep
from bitmill_service.api.exporting import plan_export
from bitmill_service.api.routes.jobs import (
    SUBMISSION,
    IdempotencyKey,
    ValidateOnly,
    follow,
    replayed,
)
from bitmill_service.http.openapi import JSON_BODY, refusals
from bitmill_service.http.problems import ProblemError
from bitmill_service.schemas import ExportView, JobView
from bitmill_workers.job_spec import ExportSpec, parse_stored

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["jobs"])


@router.post(
    "/exports",
    status_code=status.HTTP_202_ACCEPTED,
    response_model=JobView,
    responses=refusals(
        *(*JSON_BODY, *SUBMISSION, "job_not_found", "job_not_finished"),
        *("no_such_output", "file_missing", "files_discarded"),
    )
    | {200: {"model": ExportView, "description": "What it takes; `validate_only` was set."}},
)
def create_export(
    target: ExportTarget,
    job: JobDep,
    context: ContextDep,
    caller: PrincipalDep,
    idempotency_key: IdempotencyKey = None,
    validate_only: ValidateOnly = False,
) -> Response:
    """Write the result in the format of another runtime, by a job of its own.

    What the format has no place for is refused here, by name.
    """
    spec = ExportSpec(
        **dict(target),
        model=parse_stored(job.kind, job.spec).model,
        job_id=job.id,
        label=job.label,
    )
    request_hash = sha256_json({"export": spec.model_dump(mode="json")})
    if not validate_only and (
        found := replayed(context, idempotency_key, request_hash, tenant=job.tenant)
    ):
        return found
    report = plan_export(context, job, target)
    if validate_only:
        if report is None:
            raise ProblemError("no_such_output", f"the format of job {job.id} tells no sizes")
        return JSONResponse(ExportView(**dict(report)).model_dump(mode="json"))
    return follow(
        context,
        caller,
        job,
        spec,
        idempotency_key=idempotency_key,
        request_hash=request_hash,
        keep_days=caller.limits.keep_days or context.settings.keep_days,
    )
