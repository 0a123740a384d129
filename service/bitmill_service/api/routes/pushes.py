"""Pushes of a finished job's files to the Hub: jobs of their own, of kind `push`.

The token comes with the request, is encrypted under the operator's key before it is stored, and is
erased when the push has ended. It is part of no specification, so a push cannot be tried again
without a new request.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Response, status
from pydantic import Field, SecretStr

from bitmill.errors import InputError
from bitmill.io.atomic import sha256_json
from bitmill_service.api.context import Context, ContextDep, JobDep, PrincipalDep, require_success
from bitmill_service.api.routes.jobs import SUBMISSION, IdempotencyKey, follow, replayed
from bitmill_service.http.openapi import JSON_BODY, refusals
from bitmill_service.schemas import JobView
from bitmill_workers.job_spec import (
    ExportSpec,
    HubModel,
    JobSpec,
    PushSpec,
    PushTarget,
    parse_stored,
)
from bitmill_workers.store.records import JobRecord
from bitmill_workers.store.tokens import seal

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["jobs"])


class PushRequest(PushTarget):
    """Where to, and a token of the Hub with the right to write there."""

    token: Annotated[SecretStr, Field(min_length=1, max_length=512)]


@router.post(
    "/push",
    status_code=status.HTTP_202_ACCEPTED,
    response_model=JobView,
    responses=refusals(
        *(*JSON_BODY, *SUBMISSION, "job_not_found", "job_not_finished"),
        *("no_such_output", "files_discarded"),
    ),
)
def create_push(
    asked: PushRequest,
    job: JobDep,
    context: ContextDep,
    caller: PrincipalDep,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Send the job's files to a repository of the Hub, with a model card made from its report.

    Refused (`push_not_configured`) where the service has no key to encrypt the token under.
    """
    key, token = context.settings.push_key, asked.token
    if key is None:
        raise InputError(
            "this service keeps no tokens: it has no BITMILL_PUSH_KEY to encrypt them under",
            code="push_not_configured",
            hint="Ask the operator for one, or download the files and use `bitmill push DIR`.",
        )
    require_success(job)
    target = PushTarget.model_validate(asked.model_dump(exclude={"token"}))
    spec = _spec_of(context, job, target, caller.sees)
    request_hash = sha256_json({"push": spec.model_dump(mode="json")})
    if found := replayed(context, idempotency_key, request_hash, tenant=job.tenant):
        return found
    return follow(
        context,
        caller,
        job,
        spec,
        idempotency_key=idempotency_key,
        request_hash=request_hash,
        sealed=lambda job_id: seal(key, job_id, token),
    )


def _spec_of(context: Context, job: JobRecord, target: PushTarget, tenant: str | None) -> PushSpec:
    """What the worker is told; what the card says comes from the job that quantized."""
    spec, packed = parse_stored(job.kind, job.spec), job
    if isinstance(spec, PushSpec):
        raise InputError(
            f"job {job.id} is a push and has no files: name the job that `parent_id` names",
            code="not_packed",
            param="job_id",
        )
    if isinstance(spec, ExportSpec):
        packed = context.jobs.get(spec.job_id, tenant=tenant)
    made = parse_stored(packed.kind, packed.spec)
    source = spec.model.repo_id if isinstance(spec.model, HubModel) else None
    told = target.model_dump() | {"base_model": target.base_model or source}
    return PushSpec(
        **told,
        model=spec.model,
        job_id=job.id,
        packed_job=packed.id,
        calibration=made.calibration if isinstance(made, JobSpec) else None,
        label=job.label,
    )
