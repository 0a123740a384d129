"""Queues and workers: who is there, and who takes no more jobs. Needs the scope admin."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Path

from bitmill_service.api.context import Context, ContextDep, PrincipalDep
from bitmill_service.api.views import progress_view
from bitmill_service.http.openapi import CHANGES, refusals
from bitmill_service.schemas import QueueView, WorkersView, WorkerView
from bitmill_workers.settings import TIERS

router = APIRouter(prefix="/v1/workers", tags=["workers"])

WorkerName = Annotated[str, Path(max_length=200, description="Name of a worker.")]
QueueName = Annotated[
    Literal["cpu", "gpu-24", "gpu-48", "gpu-80", "gpu-180"], Path(description="Queue.")
]


def _shown(context: Context) -> WorkersView:
    load = context.jobs.load()
    queues, drained = context.catalog.paused("queue"), context.catalog.paused("worker")
    return WorkersView(
        queues=[
            QueueView(name=name, paused=name in queues, **load.get(name, {})) for name in TIERS
        ],
        workers=[
            WorkerView(
                name=worker.name,
                host=worker.host,
                queues=worker.queues,
                device=worker.device,
                version=worker.version,
                last_seen=datetime.fromtimestamp(worker.last_seen, UTC),
                device_free=worker.device_free,
                device_total=worker.device_total,
                job_id=worker.job_id,
                stage=worker.stage,
                progress=progress_view(worker.progress),
                drains=worker.name in drained,
            )
            for worker in context.catalog.workers()
        ],
    )


@router.get("", response_model=WorkersView)
def list_workers(context: ContextDep) -> WorkersView:
    """All queues, and the workers seen within a minute."""
    return _shown(context)


@router.post("/queues/{queue}/pause", response_model=WorkersView, responses=refusals(*CHANGES))
def pause_queue(queue: QueueName, context: ContextDep, caller: PrincipalDep) -> WorkersView:
    """Give out no more jobs of a queue; jobs are taken, running ones go on."""
    context.catalog.pause("queue", queue, by=caller.key_id)
    return _shown(context)


@router.post("/queues/{queue}/resume", response_model=WorkersView, responses=refusals(*CHANGES))
def resume_queue(queue: QueueName, context: ContextDep) -> WorkersView:
    """Give out the jobs of a queue again."""
    context.catalog.resume("queue", queue)
    return _shown(context)


@router.post("/{name}/drain", response_model=WorkersView, responses=refusals(*CHANGES))
def drain_worker(name: WorkerName, context: ContextDep, caller: PrincipalDep) -> WorkersView:
    """Let a worker finish its job and take no other, so that it can be stopped; also beforehand."""
    context.catalog.pause("worker", name, by=caller.key_id)
    return _shown(context)


@router.post("/{name}/resume", response_model=WorkersView, responses=refusals(*CHANGES))
def resume_worker(name: WorkerName, context: ContextDep) -> WorkersView:
    """Let a worker take jobs again."""
    context.catalog.resume("worker", name)
    return _shown(context)
