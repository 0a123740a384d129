"""Sweeps in the job database: many jobs that are submitted, looked at and cancelled as one.

A cell of a sweep is the newest job that names it, so a job that is retried takes its place.
"""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal

import sqlalchemy as sa

from bitmill_workers.errors import JobNotFound, StateConflict, SweepNotFound
from bitmill_workers.job_spec import JobSpec
from bitmill_workers.store.db import Database, db_now
from bitmill_workers.store.jobs import (
    IDEMPOTENCY_S,
    JobStore,
    check_same_request,
    insert_job,
    new_job,
)
from bitmill_workers.store.needs import refuse_needed
from bitmill_workers.store.records import (
    CellEnd,
    JobRecord,
    Quota,
    SweepRecord,
    job_record,
    new_id,
)
from bitmill_workers.store.states import ACTIVE, TERMINAL, ShownState, shown_state
from bitmill_workers.store.tables import jobs, sweep_stages, sweeps

_SHOWN = [c for c in sweeps.c if c.name not in ("idempotency_key", "request_hash")]


class SweepStore:
    """Sweeps; every method but `request_cancel` is one transaction."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.jobs = JobStore(database)

    def submit(
        self,
        spec: dict[str, Any],
        cells: Sequence[tuple[int, JobSpec, str]],
        *,
        label: str | None,
        tenant: str,
        idempotency_key: str | None = None,
        request_hash: str = "",
        priority: int = 0,
        created_by: str | None = None,
        quota: Quota | None = None,
        keep_days: float | None = None,
    ) -> tuple[SweepRecord, bool]:
        """Store a sweep and all of its jobs, or none; whether it was there already.

        spec: what is shown of it. cells: number, specification and queue of each, in the order in
        which they run. The same key and hash give the same sweep for a day. Raises what
        `JobStore.submit` raises.
        """
        values = {
            "id": new_id(),
            "tenant": tenant,
            "label": label,
            "spec": spec,
            "idempotency_key": idempotency_key,
            "request_hash": request_hash,
            "created_at": db_now(),
            "created_by": created_by,
        }
        with self.database.write() as conn:
            self.jobs.wait_for_tenant(conn, tenant)
            if known := _known(conn, tenant, idempotency_key, request_hash):
                return known, True
            self.jobs.check_quota(conn, tenant, quota, more=len(cells))
            row = conn.execute(sa.insert(sweeps).values(values).returning(*_SHOWN)).one()
            sweep = SweepRecord(**row._mapping)
            for number, job, queue in cells:
                columns = new_job(
                    job,
                    tenant=tenant,
                    queue=queue,
                    priority=priority,
                    parent_id=None,
                    webhook_url=None,
                    created_by=created_by,
                    max_running=quota and quota.running,
                    keep_days=keep_days,
                    cell=(sweep.id, number),
                )
                insert_job(conn, columns)
            return sweep, False

    def submitted(self, key: str, request_hash: str, *, tenant: str) -> SweepRecord | None:
        """The sweep that this key made within a day, or None; raises `IdempotencyMismatch`."""
        with self.database.read() as conn:
            return _known(conn, tenant, key, request_hash)

    def get(self, sweep_id: str, *, tenant: str | None = None) -> SweepRecord:
        """One sweep; raises `SweepNotFound`, also where it belongs to another tenant."""
        with self.database.read() as conn:
            return _get(conn, sweep_id, tenant)

    def list(
        self, *, tenant: str | None = None, limit: int = 50, after: str | None = None
    ) -> builtins.list[SweepRecord]:
        """Sweeps, newest first; `after` is the last id of a former page."""
        query = sa.select(*_SHOWN).order_by(sweeps.c.id.desc()).limit(limit)
        if tenant is not None:
            query = query.where(sweeps.c.tenant == tenant)
        if after is not None:
            query = query.where(sweeps.c.id < after)
        with self.database.read() as conn:
            return [SweepRecord(**row._mapping) for row in conn.execute(query)]

    def cells(self, sweep_id: str) -> dict[int, JobRecord]:
        """The newest job of every cell, by the cell's number; none of cells that were deleted."""
        order = (jobs.c.cell, jobs.c.created_at, jobs.c.id)
        query = sa.select(jobs).where(jobs.c.sweep_id == sweep_id).order_by(*order)
        with self.database.read() as conn:
            found = [job_record(row) for row in conn.execute(query)]
        return {job.cell: job for job in found if job.cell is not None}

    def states(self, sweep_ids: Sequence[str]) -> dict[str, dict[int, ShownState]]:
        """The state of the newest job of every cell, by sweep and number; reads no results."""
        columns = (jobs.c.sweep_id, jobs.c.cell, jobs.c.state, jobs.c.cancel_requested_at)
        query = sa.select(*columns).where(jobs.c.sweep_id.in_(sweep_ids))
        found: dict[str, dict[int, ShownState]] = {name: {} for name in sweep_ids}
        with self.database.read() as conn:
            for row in conn.execute(query.order_by(jobs.c.created_at, jobs.c.id)):
                state = shown_state(row.state, row.cancel_requested_at is not None)
                found[row.sweep_id][row.cell] = state
        return found

    def ends(self, sweep_id: str) -> builtins.list[CellEnd]:
        """Where the events of every job of the sweep end now, those of superseded jobs too."""
        columns = (jobs.c.id, jobs.c.cell, jobs.c.next_seq, jobs.c.state)
        query = sa.select(*columns).where(jobs.c.sweep_id == sweep_id).order_by(jobs.c.id)
        with self.database.read() as conn:
            return [
                CellEnd(row.id, row.cell, row.next_seq - 1, row.state in TERMINAL)
                for row in conn.execute(query)
            ]

    def request_cancel(
        self, sweep_id: str, *, tenant: str | None = None, by: str | None = None
    ) -> None:
        """Cancel every job that is queued or active; repeating it changes nothing.

        Those that run last are cancelled first, so that none begins meanwhile.
        """
        self.get(sweep_id, tenant=tenant)
        unfinished = (jobs.c.sweep_id == sweep_id, jobs.c.state.not_in(sorted(TERMINAL)))
        query = sa.select(jobs.c.id).where(*unfinished).order_by(jobs.c.fair_rank.desc())
        with self.database.read() as conn:
            found = conn.execute(query).scalars().all()
        for job_id in found:
            with suppress(JobNotFound, StateConflict):  # it has ended meanwhile
                self.jobs.request_cancel(job_id, by=by)

    def delete(self, sweep_id: str, *, tenant: str | None = None) -> None:
        """Remove a sweep whose jobs have all finished, with these jobs.

        Raises `SweepNotFound`, and `StateConflict`: code `sweep_not_finished`, or `job_in_use`
        where an unfinished job needs the files of one of them.
        """
        mine = jobs.c.sweep_id == sweep_id
        with self.database.write() as conn:
            _get(conn, sweep_id, tenant)
            query = sa.select(jobs.c.id, jobs.c.state).where(mine).order_by(jobs.c.id)
            cells = conn.execute(query.with_for_update()).all()
            if any(cell.state not in TERMINAL for cell in cells):
                raise StateConflict(
                    f"sweep {sweep_id} has unfinished jobs: cancel it before deleting it",
                    code="sweep_not_finished",
                )
            refuse_needed(conn, "job", [cell.id for cell in cells], tenant)
            conn.execute(sa.delete(jobs).where(mine))
            conn.execute(sa.delete(sweeps).where(sweeps.c.id == sweep_id))

    def profiles(self, sweep_id: str) -> builtins.list[str]:
        """Ids of the profiles that jobs of the sweep have made or used so far."""
        mine = (jobs.c.sweep_id == sweep_id, jobs.c.profile_id.is_not(None))
        with self.database.read() as conn:
            query = sa.select(jobs.c.profile_id).where(*mine).distinct()
            return [str(found) for found in conn.execute(query).scalars()]

    def take_stage(
        self, sweep_id: str, stage: str, job_id: str, token: int
    ) -> Literal["mine", "made", "wait"]:
        """Take the lease of a stage for an attempt at a job, unless it was made or another has it.

        Another has it while its own lease lasts, which its worker renews.
        """
        mine = (sweep_stages.c.sweep_id == sweep_id, sweep_stages.c.stage == stage)
        values = {"sweep_id": sweep_id, "stage": stage, "job_id": job_id, "token": token}
        with self.database.write() as conn:
            statement = self.database.insert(sweep_stages).values(values | {"made": False})
            conn.execute(statement.on_conflict_do_nothing())
            lives = sa.exists().where(
                jobs.c.id == sweep_stages.c.job_id,
                jobs.c.token == sweep_stages.c.token,
                jobs.c.state.in_(sorted(ACTIVE)),
                jobs.c.lease_until >= db_now(),
            )
            query = sa.select(sweep_stages, lives.label("lives")).where(*mine)
            row = conn.execute(query.with_for_update()).one()
            if row.made:
                return "made"
            if (row.job_id, row.token) == (job_id, token):
                return "mine"
            if row.lives:
                return "wait"
            taken = {"job_id": job_id, "token": token}
            conn.execute(sa.update(sweep_stages).where(*mine).values(taken))
            return "mine"

    def stage_made(self, sweep_id: str, stage: str, job_id: str, token: int) -> None:
        """An attempt has made the stage that it had the lease of, and others can have it."""
        mine = (sweep_stages.c.sweep_id == sweep_id, sweep_stages.c.stage == stage)
        held = (sweep_stages.c.job_id == job_id, sweep_stages.c.token == token)
        with self.database.write() as conn:
            conn.execute(sa.update(sweep_stages).where(*mine, *held).values(made=True))

    def over(self) -> builtins.list[str]:
        """Sweeps with stages, none of whose jobs is queued or active."""
        work = sa.exists().where(
            jobs.c.sweep_id == sweep_stages.c.sweep_id, jobs.c.state.not_in(sorted(TERMINAL))
        )
        query = sa.select(sweep_stages.c.sweep_id).where(sa.not_(work)).distinct()
        with self.database.read() as conn:
            return [str(found) for found in conn.execute(query).scalars()]

    def forget_stages(self, sweep_id: str) -> None:
        """Their results are gone."""
        with self.database.write() as conn:
            conn.execute(sa.delete(sweep_stages).where(sweep_stages.c.sweep_id == sweep_id))

    def at_work(self, sweep_id: str) -> bool:
        """Whether any job of the sweep is queued or active."""
        mine = (jobs.c.sweep_id == sweep_id, jobs.c.state.not_in(sorted(TERMINAL)))
        with self.database.read() as conn:
            return bool(conn.execute(sa.select(sa.exists().where(*mine))).scalar_one())


def _get(conn: sa.Connection, sweep_id: str, tenant: str | None) -> SweepRecord:
    query = sa.select(*_SHOWN).where(sweeps.c.id == sweep_id)
    if tenant is not None:
        query = query.where(sweeps.c.tenant == tenant)
    row = conn.execute(query).one_or_none()
    if row is None:
        raise SweepNotFound(sweep_id)
    return SweepRecord(**row._mapping)


def _known(
    conn: sa.Connection, tenant: str, key: str | None, request_hash: str
) -> SweepRecord | None:
    if key is None:
        return None
    mine = (
        sweeps.c.tenant == tenant,
        sweeps.c.idempotency_key == key,
        sweeps.c.created_at > db_now() - IDEMPOTENCY_S,
    )
    row = conn.execute(sa.select(sweeps).where(*mine)).first()
    if row is None:
        return None
    check_same_request(key, row.request_hash, request_hash)
    return _get(conn, row.id, None)
