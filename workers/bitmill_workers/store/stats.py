"""Numbers about the whole service, read from the database in one view, for metrics and alerts."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import sqlalchemy as sa

from bitmill_workers.store.db import Database, db_now
from bitmill_workers.store.tables import DELIVERY_TRIES, artifacts, job_events, jobs, outbox

_RECENT = 50


@dataclass(frozen=True, slots=True)
class QueueStats:
    """Runnable jobs of one queue: how many, and how long the oldest has waited (seconds)."""

    depth: int
    oldest_s: float


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Counters count all jobs that were not deleted; times are seconds, sizes bytes."""

    queues: dict[str, QueueStats]
    running: dict[str, int]
    unsent_s: float
    attempts: int
    leases_lost: int
    runner_crashes: int
    handed_back: int
    fenced_writes: int
    webhooks_waiting: int
    artifact_bytes: int
    stage_s: dict[str, float]


def read_stats(database: Database) -> StoreStats:
    """Read everything now."""
    queued = (jobs.c.state == "queued", jobs.c.not_before <= db_now())
    with database.read() as conn:
        waited = db_now() - sa.func.min(jobs.c.queued_at)
        depths = conn.execute(
            sa.select(jobs.c.queue, sa.func.count(), waited).where(*queued).group_by(jobs.c.queue)
        ).all()
        active = jobs.c.state.in_(["running", "finalizing"])
        running = conn.execute(
            sa.select(jobs.c.queue, sa.func.count()).where(active).group_by(jobs.c.queue)
        ).all()
        unsent = conn.execute(sa.select(waited).where(*queued, jobs.c.sent_at.is_(None))).scalar()
        names = ("attempt", "lost_count", "crash_count", "handback_count")
        totals = conn.execute(
            sa.select(*(sa.func.coalesce(sa.func.sum(jobs.c[name]), 0) for name in names))
        ).one()
        fenced = _count(conn, job_events, job_events.c.kind == "fenced")
        waiting = (outbox.c.delivered_at.is_(None), outbox.c.tries < DELIVERY_TRIES)
        webhooks = _count(conn, outbox, sa.and_(*waiting))
        stored = conn.execute(
            sa.select(sa.func.coalesce(sa.func.sum(artifacts.c.size), 0))
        ).scalar_one()
        stages = _stage_seconds(conn, sa.true())
    return StoreStats(
        queues={name: QueueStats(count, float(age)) for name, count, age in depths},
        running={name: count for name, count in running},
        unsent_s=float(unsent or 0.0),
        attempts=int(totals[0]),
        leases_lost=int(totals[1]),
        runner_crashes=int(totals[2]),
        handed_back=int(totals[3]),
        fenced_writes=fenced,
        webhooks_waiting=webhooks,
        artifact_bytes=int(stored),
        stage_s=stages,
    )


def _count(conn: sa.Connection, table: sa.Table, which: sa.ColumnElement[bool]) -> int:
    query = sa.select(sa.func.count()).select_from(table).where(which)
    return int(conn.execute(query).scalar_one())


def stage_seconds(database: Database, model: str) -> dict[str, float]:
    """Mean time of each stage over the last jobs of this model, or of any where it has none."""
    with database.read() as conn:
        return _stage_seconds(conn, jobs.c.model == model) or _stage_seconds(conn, sa.true())


def _stage_seconds(conn: sa.Connection, which: sa.ColumnElement[bool]) -> dict[str, float]:
    query = sa.select(jobs.c.result).where(jobs.c.state == "succeeded", which)
    spent: dict[str, list[float]] = defaultdict(list)
    for result in conn.execute(query.order_by(jobs.c.finished_at.desc()).limit(_RECENT)).scalars():
        quality = (result or {}).get("quality") or {}
        for stage, seconds in (quality.get("seconds") or {}).items():
            spent[stage].append(float(seconds))
    return {stage: sum(values) / len(values) for stage, values in spent.items()}
