"""The queues as they are at one moment: where queued jobs stand, and who could take them.

Every status call asks this, so each statement is built once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from bitmill_workers.store.db import db_now
from bitmill_workers.store.records import JobRecord, WorkerRecord
from bitmill_workers.store.states import ACTIVE
from bitmill_workers.store.tables import QUEUED, jobs, pauses, workers

WORKER_GONE_S = 60.0
"""A worker that was not seen for this long does not count as live."""

_ACTIVE = jobs.c.state.in_([sa.literal(state) for state in sorted(ACTIVE)])
_OWN = (
    sa.select(sa.func.min(jobs.c.id))
    .where(jobs.c.owner == workers.c.name, _ACTIVE)
    .correlate(workers)
    .scalar_subquery()
)
ALL_WORKERS = (
    sa.select(workers, jobs.c.id.label("job_id"), jobs.c.stage, jobs.c.progress)
    .join_from(workers, jobs, jobs.c.id == _OWN, isouter=True)
    .order_by(workers.c.name)
)
LIVE_WORKERS = ALL_WORKERS.where(workers.c.last_seen > db_now() - WORKER_GONE_S)

_TURN = (-jobs.c.priority, jobs.c.fair_rank, jobs.c.created_at, jobs.c.id)
"""Queued jobs of a queue run in ascending order of these."""
_mine = jobs.alias("mine")
_MY_TURN = (-_mine.c.priority, _mine.c.fair_rank, _mine.c.created_at, _mine.c.id)
_BEFORE_ONE = (
    sa.select(sa.func.count(jobs.c.id))
    .select_from(
        _mine.outerjoin(
            jobs,
            sa.and_(
                jobs.c.state == QUEUED,
                jobs.c.queue == _mine.c.queue,
                sa.tuple_(*_TURN) < sa.tuple_(*_MY_TURN),
            ),
        )
    )
    .where(_mine.c.id == sa.bindparam("job_id"), _mine.c.state == QUEUED)
    .group_by(_mine.c.id)
)
_QUEUED = (
    sa.select(
        jobs.c.id,
        (sa.func.row_number().over(partition_by=jobs.c.queue, order_by=_TURN) - 1).label("before"),
    )
    .where(
        jobs.c.state == QUEUED,
        jobs.c.queue.in_(sa.bindparam("queues", expanding=True)),
    )
    .subquery()
)
_BEFORE_EACH = sa.select(_QUEUED).where(_QUEUED.c.id.in_(sa.bindparam("job_ids", expanding=True)))
_PAUSES = sa.select(pauses.c.kind, pauses.c.name)
_RUNNING = (
    sa.select(jobs.c.tenant, sa.func.count())
    .where(_ACTIVE, jobs.c.tenant.in_(sa.bindparam("tenants", expanding=True)))
    .group_by(jobs.c.tenant)
)


@dataclass(frozen=True, slots=True)
class Queues:
    """What keeps queued jobs from running.

    before: how many jobs of its queue run before each queued one, by id. paused: queues that hand
    out no jobs. workers: live ones that take jobs. running: active jobs of tenants with a limit.
    """

    before: dict[str, int] = field(default_factory=dict)
    paused: frozenset[str] = frozenset()
    workers: tuple[WorkerRecord, ...] = ()
    running: dict[str, int] = field(default_factory=dict)


def read_queues(conn: sa.Connection, of: Sequence[JobRecord]) -> Queues:
    """The queues of those of these jobs that are queued; asks nothing where none is."""
    waiting = [job for job in of if job.state == "queued"]
    before = read_before(conn, waiting)
    if not before:
        return Queues()
    paused = {"queue": set[str](), "worker": set[str]()}
    for kind, name in conn.execute(_PAUSES):
        paused[kind].add(name)
    live = read_workers(conn, LIVE_WORKERS)
    takers = tuple(worker for worker in live if worker.name not in paused["worker"])
    limited = {job.tenant for job in waiting if job.max_running is not None} if takers else set()
    running = conn.execute(_RUNNING, {"tenants": sorted(limited)}).all() if limited else ()
    return Queues(
        before, frozenset(paused["queue"]), takers, {tenant: count for tenant, count in running}
    )


def read_before(conn: sa.Connection, waiting: Sequence[JobRecord]) -> dict[str, int]:
    """How many queued jobs of the same queue run before each of these queued jobs, by id."""
    if len(waiting) == 1:
        job_id = waiting[0].id
        found = conn.execute(_BEFORE_ONE, {"job_id": job_id}).scalar_one_or_none()
        return {} if found is None else {job_id: found}
    if not waiting:
        return {}
    asked = {
        "queues": sorted({job.queue for job in waiting}),
        "job_ids": [job.id for job in waiting],
    }
    return {job_id: before for job_id, before in conn.execute(_BEFORE_EACH, asked)}


def read_workers(conn: sa.Connection, query: sa.Select[Any]) -> tuple[WorkerRecord, ...]:
    """The workers that this query of all or of live ones finds."""
    rows = conn.execute(query).all()
    return tuple(WorkerRecord(**(dict(r._mapping) | {"queues": tuple(r.queues)})) for r in rows)
