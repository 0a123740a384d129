"""What workers do with a job: claim it, keep its lease, report, and end it.

A claim gives a lease (by the database's clock) and a fencing token, one more than the last. Every
later write carries the token; a write that matches no row was fenced: the job is someone else's,
and the caller must stop at once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.sql.dml import ReturningUpdate

from bitmill.errors import BitmillError
from bitmill_workers.errors import WorkerLost
from bitmill_workers.job_spec import ExportSpec
from bitmill_workers.store.db import Database, db_now
from bitmill_workers.store.jobs import insert_child
from bitmill_workers.store.records import Artifact, JobRecord, Renewal, error_columns
from bitmill_workers.store.states import ACTIVE, State
from bitmill_workers.store.tables import artifacts, job_logs, jobs, pauses
from bitmill_workers.store.transitions import add_events, edge, follow, transition

MAX_EVENTS = 50_000
"""Progress events are dropped past this many of a job; its row still shows the progress."""
_BACKOFF_CAP_S = 60.0
_CLAIM_LOCK = 0x6269746F
_SKIP_TRIES = 50
_SKIP_WAIT_S = 0.02


class LeaseStore:
    """The workers' half of the job store; every method is one transaction."""

    def __init__(self, database: Database, *, lease_s: float) -> None:
        self.database = database
        self.lease_s = lease_s
        self._claims: dict[tuple[str, ...], ReturningUpdate[Any]] = {}

    def claim_next(self, owner: str, queues: Sequence[str]) -> JobRecord | None:
        """Claim the first runnable job of these queues: by priority, fair rank and age."""
        for _ in range(_SKIP_TRIES):
            job = self._claim(owner, queues)
            if job is not None or not self._skipped(queues):
                return job
            time.sleep(_SKIP_WAIT_S)
        return None

    def _skipped(self, queues: Sequence[str]) -> bool:
        """True where a job was passed over because another transaction held its row.

        That may be a note that its message was sent: giving up would leave the job waiting.
        """
        if self.database.dialect != "postgresql":
            return False
        with self.database.read() as conn:
            runnable = sa.exists().where(*_runnable(queues))
            return bool(conn.execute(sa.select(runnable)).scalar_one())

    def _claim(self, owner: str, queues: Sequence[str]) -> JobRecord | None:
        key = tuple(queues)
        if key not in self._claims:
            self._claims[key] = _claim_edge(_first(queues, self.database.dialect), self.lease_s)
        parameters, event = {"claimer": owner}, {"owner": owner}
        with self.database.write() as conn:
            if self.database.dialect == "postgresql":
                _count_alone(conn)
            return follow(conn, self._claims[key], "running", parameters=parameters, event=event)

    def renew(self, job_id: str, token: int) -> Renewal:
        """Extend the lease, and learn whether a cancel was asked or the deadline has passed."""
        renewed = sa.update(jobs).where(_held(job_id, token))
        statement = renewed.values(lease_until=db_now() + self.lease_s).returning(*_flags())
        with self.database.write() as conn:
            return _renewal(conn.execute(statement).one_or_none())

    def look(self, job_id: str, token: int) -> Renewal:
        """What `renew` answers, without writing."""
        with self.database.read() as conn:
            query = sa.select(*_flags()).where(_held(job_id, token))
            return _renewal(conn.execute(query).one_or_none())

    def report(
        self,
        job_id: str,
        token: int,
        events: Sequence[tuple[str, dict[str, Any]]],
        *,
        stage: str | None = None,
        progress: dict[str, Any] | None = None,
        remaining_s: float | None = None,
        profile_id: str | None = None,
    ) -> bool:
        """Append events and show stage and progress; False where the caller is fenced."""
        given = {
            "stage": stage,
            "progress": progress,
            "estimated_finish": None if remaining_s is None else db_now() + remaining_s,
            "profile_id": profile_id,
        }
        values = {name: value for name, value in given.items() if value is not None}
        with self.database.write() as conn:
            seq = conn.execute(
                sa.select(jobs.c.next_seq).where(_held(job_id, token))
            ).scalar_one_or_none()
            if seq is None:
                return False
            kept = [e for e in events if seq < MAX_EVENTS or e[0] != "progress"]
            return add_events(conn, _held(job_id, token), kept, values=values)

    def append_log(self, job_id: str, token: int, data: bytes, *, limit: int) -> bool:
        """Append to the job's log up to `limit` bytes in all; False where the caller is fenced."""
        with self.database.write() as conn:
            # Locked, because the insert below has no condition of its own.
            mine = sa.select(jobs.c.log_size).where(_held(job_id, token)).with_for_update()
            size = conn.execute(mine).scalar_one_or_none()
            if size is None:
                return False
            data = data[: max(0, limit - size)]
            if data:
                grown = sa.update(jobs).where(_held(job_id, token))
                conn.execute(grown.values(log_size=jobs.c.log_size + len(data)))
                conn.execute(sa.insert(job_logs).values(job_id=job_id, start=size, data=data))
            return True

    def finalize(self, job_id: str, token: int) -> bool:
        """The runner is done and its files are being published; False where fenced."""
        values = {"finalizing_at": db_now(), "stage": "publish"}
        with self.database.write() as conn:
            mine = _held(job_id, token)
            job = transition(conn, mine, "finalizing", values=values)
            return job is not None or _fenced(conn, job_id, token, "finalizing")

    def finish(
        self,
        job_id: str,
        token: int,
        result: dict[str, Any],
        files: Sequence[Artifact],
        *,
        profile_id: str | None = None,
        exports: Sequence[ExportSpec] = (),
    ) -> bool:
        """Make the attempt's files visible and the job succeeded, in one transaction.

        exports: jobs to start of those files. False where the caller is fenced: then nothing became
        visible. Repeating a finish that did commit answers True.
        """
        values = {"result": result, "profile_id": profile_id}
        with self.database.write() as conn:
            job = transition(conn, _held(job_id, token), "succeeded", values=values)
            if job is None:
                return _fenced(conn, job_id, token, "succeeded")
            rows = [
                {
                    "job_id": job_id,
                    "path": f.path,
                    "size": f.size,
                    "sha256": f.sha256,
                    "storage_key": f.storage_key,
                }
                for f in files
            ]
            if rows:
                conn.execute(sa.insert(artifacts), rows)
            for spec in exports:
                made = {"job_id": insert_child(conn, job, spec).id, "format": spec.format}
                add_events(conn, jobs.c.id == job_id, [("export", made)])
            return True

    def fail(self, job_id: str, token: int, error: BitmillError) -> bool:
        """End the job as failed; False where the caller is fenced."""
        values, event = error_columns(error), {"code": error.code}
        with self.database.write() as conn:
            job = transition(conn, _held(job_id, token), "failed", values=values, event=event)
            return job is not None or _fenced(conn, job_id, token, "failed")

    def cancelled(self, job_id: str, token: int) -> bool:
        """End the job as cancelled, now that its runner is gone; False where fenced."""
        with self.database.write() as conn:
            asked = jobs.c.cancel_requested_at.is_not(None)
            job = transition(conn, _held(job_id, token), "cancelled", where=[asked])
            return job is not None or _fenced(conn, job_id, token, "cancelled")

    def hand_back(self, job_id: str, token: int, reason: str, *, retries: int) -> bool:
        """Return the job to the queue at once because this worker stops; False where fenced."""
        with self.database.write() as conn:
            return requeue(
                conn,
                _held(job_id, token),
                counter="handback_count",
                retries=retries,
                reason=reason,
                failure=WorkerLost("the job was handed back too often"),
                delay_s=0.0,
            ) or _fenced(conn, job_id, token, "queued")

    def retry_crash(self, job_id: str, token: int, error: BitmillError, *, retries: int) -> bool:
        """Queue the job again after a process of it died, or fail it with this error."""
        with self.database.write() as conn:
            return requeue(
                conn,
                _held(job_id, token),
                counter="crash_count",
                retries=retries,
                reason=error.message,
                failure=error,
            ) or _fenced(conn, job_id, token, "queued")

    def retry_larger(self, job_id: str, token: int, queue: str | None, error: BitmillError) -> bool:
        """Move the job once to the next memory tier, or fail it with this error."""
        with self.database.write() as conn:
            return requeue(
                conn,
                _held(job_id, token),
                counter="oom_count",
                retries=0 if queue is None else 1,
                reason=error.message,
                failure=error,
                delay_s=0.0,
                values={} if queue is None else {"queue": queue},
            ) or _fenced(conn, job_id, token, "queued")


def requeue(
    conn: sa.Connection,
    which: sa.ColumnElement[bool],
    *,
    counter: str,
    retries: int,
    reason: str,
    failure: BitmillError,
    delay_s: float | None = None,
    values: dict[str, Any] | None = None,
) -> bool:
    """End an attempt: cancelled if that was asked, queued again while `counter` allows, or failed.

    The delay doubles with each retry of a kind, from 0 for the first to a minute at most.
    False where `which` selects no active job.
    """
    count = jobs.c[counter]
    active: Sequence[State] = sorted(ACTIVE)
    asked = jobs.c.cancel_requested_at.is_not(None)
    if transition(conn, which, "cancelled", sources=active, where=[asked]):
        return True
    row = conn.execute(sa.select(count.label("n")).where(which)).one_or_none()
    if row is None:
        return False
    delay = min(_BACKOFF_CAP_S, 2.0**row.n - 1) if delay_s is None else delay_s
    columns = {counter: count + 1, "not_before": db_now() + delay} | (values or {})
    event = {"reason": reason}
    again = transition(conn, which, "queued", where=[count < retries], values=columns, event=event)
    if again is not None:
        return True
    ended = error_columns(failure) | {counter: count + 1}
    event = {"reason": reason, "code": failure.code}
    return transition(conn, which, "failed", sources=active, values=ended, event=event) is not None


def _flags() -> tuple[sa.ColumnElement[float | None], sa.ColumnElement[bool]]:
    # Not `IS NOT NULL`: SQLite 3.40 answers 1 for it in RETURNING even where the value is NULL.
    overdue = sa.func.coalesce(jobs.c.deadline_at < db_now(), sa.false())
    return jobs.c.cancel_requested_at, overdue.label("overdue")


def _renewal(row: sa.Row[float | None, bool] | None) -> Renewal:
    if row is None:
        return Renewal(held=False)
    cancel = row.cancel_requested_at is not None
    return Renewal(held=True, cancel=cancel, overdue=bool(row.overdue))


def _runnable(queues: Sequence[str]) -> tuple[sa.ColumnElement[bool], ...]:
    # The state is no parameter: a prepared plan could not use the partial index of queued jobs.
    # A list of single literals, unlike a list of strings, is not spelled out at every execution.
    return (
        jobs.c.state == sa.literal_column("'queued'"),
        jobs.c.queue.in_([sa.literal(queue) for queue in queues]),
        jobs.c.not_before <= db_now(),
        _has_room(),
        jobs.c.queue.not_in(sa.select(pauses.c.name).where(pauses.c.kind == "queue")),
    )


def _count_alone(conn: sa.Connection) -> None:
    """Where running jobs are limited, claims wait for each other, so that none is one too many."""
    limited = sa.exists().where(jobs.c.state == "queued", jobs.c.max_running.is_not(None))
    if conn.execute(sa.select(limited)).scalar_one():
        conn.execute(sa.select(sa.func.pg_advisory_xact_lock(_CLAIM_LOCK)))


def _has_room() -> sa.ColumnElement[bool]:
    """Whether the job's tenant runs fewer jobs than it may."""
    other = jobs.alias("other")
    running = sa.select(sa.func.count()).where(
        other.c.tenant == jobs.c.tenant, other.c.state.in_(["running", "finalizing"])
    )
    return sa.or_(jobs.c.max_running.is_(None), running.scalar_subquery() < jobs.c.max_running)


def _first(queues: Sequence[str], dialect: str) -> sa.ScalarSelect[str]:
    """The job that is claimed next; claimers on PostgreSQL skip what another has locked."""
    order = (jobs.c.priority.desc(), jobs.c.fair_rank, jobs.c.created_at)
    stopped = (pauses.c.kind == "worker", pauses.c.name == sa.bindparam("claimer"))
    drained = sa.exists().where(*stopped)
    head = sa.select(jobs.c.id).where(*_runnable(queues), sa.not_(drained)).order_by(*order)
    head = head.limit(sa.literal_column("1"))
    if dialect == "postgresql":
        head = head.with_for_update(skip_locked=True)
    return head.scalar_subquery()


def _claim_edge(first: sa.ScalarSelect[str], lease_s: float) -> ReturningUpdate[Any]:
    """Queued to running, for the parameter `claimer`."""
    values = {
        "owner": sa.bindparam("claimer"),
        "token": jobs.c.token + 1,
        "attempt": jobs.c.attempt + 1,
        "lease_until": db_now() + lease_s,
        "started_at": sa.func.coalesce(jobs.c.started_at, db_now()),
    }
    return edge(jobs.c.id == first, "running", values=values)


def _held(job_id: str, token: int) -> sa.ColumnElement[bool]:
    return sa.and_(jobs.c.id == job_id, jobs.c.token == token, jobs.c.state.in_(sorted(ACTIVE)))


def _fenced(conn: sa.Connection, job_id: str, token: int, target: State) -> bool:
    """Record a refused write; True where it was in fact a repetition of one that committed."""
    job = conn.execute(sa.select(jobs).where(jobs.c.id == job_id)).one_or_none()
    if job is None:
        return False
    if job.token == token and job.state == target:
        return True
    active = sa.and_(jobs.c.id == job_id, jobs.c.state.not_in(("succeeded", "failed", "cancelled")))
    add_events(conn, active, [("fenced", {"token": token, "target": target})])
    return False
