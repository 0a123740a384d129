"""Where queued jobs stand, and what keeps each from running."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TypedDict

from bitmill_service.api.context import Context
from bitmill_workers.store.records import JobRecord
from bitmill_workers.store.states import ACTIVE


class Members(TypedDict):
    """Members of a job's view; None unless it is queued."""

    queue_position: int | None
    waits_for: str | None


class Waiting:
    """The queues as they are now, for these jobs; asks nothing where none of them waits."""

    def __init__(self, context: Context, jobs: Sequence[JobRecord]) -> None:
        self._jobs = context.jobs
        self._before = context.jobs.queue_positions(jobs)
        if self._before:
            self._paused = context.catalog.paused("queue")
            drained = context.catalog.paused("worker")
            self._workers = [w for w in context.catalog.workers() if w.name not in drained]

    def members(self, job: JobRecord) -> Members:
        """What to show of this job."""
        before = self._before.get(job.id)
        reason = None if before is None else self._reason(job, before)
        return {"queue_position": before, "waits_for": reason}

    def _reason(self, job: JobRecord, before: int) -> str:
        if job.queue in self._paused:
            return f"the queue {job.queue} is paused"
        serving = [worker for worker in self._workers if job.queue in worker.queues]
        if not serving:
            return f"no worker that takes jobs serves the queue {job.queue}"
        if before:
            return f"{before} {'job is' if before == 1 else 'jobs are'} before it"
        if job.not_before > time.time():
            return "a pause before the next attempt"
        if job.max_running is not None:
            counts = self._jobs.counts(tenant=job.tenant)
            running = sum(counts.get(state, 0) for state in ACTIVE)
            if running >= job.max_running:
                return f"{running} jobs of this tenant run, at most {job.max_running} may"
        if all(worker.job_id for worker in serving):
            return "all workers of its queue are busy"
        return "a worker is about to take it"
