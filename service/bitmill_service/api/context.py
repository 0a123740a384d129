"""What every route needs, made once per process and handed out as dependencies."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

from fastapi import Depends, Path, Request
from prometheus_client import CollectorRegistry
from pydantic import AfterValidator, WithJsonSchema

from bitmill_service.api.plans import Plans
from bitmill_service.http.access import KeyRing, Principal
from bitmill_service.http.connections import connection_limit
from bitmill_service.http.problems import ProblemError
from bitmill_service.settings import ServiceSettings
from bitmill_workers.storage.artifacts import ArtifactStore
from bitmill_workers.store.catalog import Catalog
from bitmill_workers.store.db import Database
from bitmill_workers.store.jobs import JobStore
from bitmill_workers.store.records import JobRecord
from bitmill_workers.store.sweeps import SweepStore
from bitmill_workers.store.uploads import UploadStore


@dataclass
class Context:
    """Stores and settings of this process.

    notify: tells the broker about a queued job (id, queue) without waiting for it; a lost message
    is harmless, because the reconciler sends again. stopping: set when the server goes down, so
    that streams end. streams: how many event streams of each tenant are open, of `max_streams`.
    """

    settings: ServiceSettings
    database: Database
    jobs: JobStore
    catalog: Catalog
    artifacts: ArtifactStore
    keys: KeyRing
    uploads: UploadStore
    sweeps: SweepStore
    notify: Callable[[str, str], None] = lambda job_id, queue: None
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    streams: Counter[str] = field(default_factory=Counter)
    plans: Plans = field(default_factory=Plans)
    max_streams: int = field(default_factory=lambda: connection_limit() // 2)


# Coroutines, because FastAPI gives a thread to every dependency that is none.
async def get_context(request: Request) -> Context:
    """The context of the app that answers this request."""
    context = request.app.state.context
    assert isinstance(context, Context)
    return context


ContextDep = Annotated[Context, Depends(get_context)]


async def get_principal(request: Request) -> Principal:
    """Who calls, as `Access` found out."""
    caller = request.state.principal
    assert isinstance(caller, Principal)
    return caller


PrincipalDep = Annotated[Principal, Depends(get_principal)]
ID_PATTERN = r"^[A-Za-z0-9_-]{1,64}$"
JobId = Annotated[str, Path(pattern=ID_PATTERN, description="Job id.")]
_UUID = r"^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$"
_HASH = r"^[0-9a-f]{16,64}$"


def _cursor(pattern: str, text: str) -> str:
    if re.fullmatch(pattern, text) is None:
        raise ValueError(f"{text[:80]!r} is not the `next` of a page of this list")
    return text


JobCursor = Annotated[
    str,
    AfterValidator(partial(_cursor, _UUID)),
    WithJsonSchema({"type": "string", "pattern": _UUID}),
]
"""`next` of a page of jobs or sweeps, which may have been deleted since."""
HashCursor = Annotated[
    str,
    AfterValidator(partial(_cursor, _HASH)),
    WithJsonSchema({"type": "string", "pattern": _HASH}),
]
"""`next` of a page of profiles or maps."""


def get_job(job_id: JobId, context: ContextDep, caller: PrincipalDep) -> JobRecord:
    """The job of the path; 404 `job_not_found` where the caller can see none."""
    return context.jobs.get(job_id, tenant=caller.sees)


JobDep = Annotated[JobRecord, Depends(get_job)]


def require_success(job: JobRecord) -> None:
    """Raise `ProblemError` unless the job has succeeded and its files are kept."""
    if job.discarded_at is not None:
        raise ProblemError(
            "files_discarded", f"the files of job {job.id} were discarded after their time"
        )
    if job.state == "succeeded":
        return
    code = "no_such_output" if job.finished else "job_not_finished"
    raise ProblemError(code, f"job {job.id} is {job.shown_state} and has no files")
