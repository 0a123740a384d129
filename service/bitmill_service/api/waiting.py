"""Where queued jobs stand, and what keeps each from running."""

from __future__ import annotations

import time
from typing import TypedDict

from bitmill_workers.store.queues import Queues
from bitmill_workers.store.records import JobRecord


class Members(TypedDict):
    """Members of a job's view; None unless it is queued."""

    queue_position: int | None
    waits_for: str | None


def waiting(job: JobRecord, queues: Queues) -> Members:
    """What to show of a job."""
    before = queues.before.get(job.id)
    reason = None if before is None else _reason(job, before, queues)
    return {"queue_position": before, "waits_for": reason}


def _reason(job: JobRecord, before: int, queues: Queues) -> str:
    if job.queue in queues.paused:
        return f"the queue {job.queue} is paused"
    serving = [worker for worker in queues.workers if job.queue in worker.queues]
    if not serving:
        return f"no worker that takes jobs serves the queue {job.queue}"
    if before:
        return f"{before} {'job is' if before == 1 else 'jobs are'} before it"
    if job.not_before > time.time():
        return "a pause before the next attempt"
    running = queues.running.get(job.tenant, 0)
    if job.max_running is not None and running >= job.max_running:
        return f"{running} jobs of this tenant run, at most {job.max_running} may"
    if all(worker.job_id for worker in serving):
        return "all workers of its queue are busy"
    return "a worker is about to take it"
