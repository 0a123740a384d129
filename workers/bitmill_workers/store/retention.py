"""Which finished jobs' files have been kept long enough: by their age, and by their tenant's bytes.

A tenant's results may take `keep_bytes` of its keys, the largest of those that can be used, where a
key without one has the service's. Over it the oldest go first. Pinned jobs, what unfinished jobs
need, and each tenant's latest result stay, and count.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import sqlalchemy as sa

from bitmill_workers.store.db import Database, db_now
from bitmill_workers.store.limits import Limits
from bitmill_workers.store.needs import users
from bitmill_workers.store.records import JobRecord
from bitmill_workers.store.tables import api_keys, artifacts, jobs

_KEPT = (jobs.c.state == "succeeded", jobs.c.discarded_at.is_(None))
_DUE = (
    sa.not_(jobs.c.pinned),
    jobs.c.keep_days.is_not(None),
    db_now() - jobs.c.finished_at > jobs.c.keep_days * 86400.0,
)


@dataclass(frozen=True, slots=True)
class Leaving:
    """A job whose files may go, their bytes, and why."""

    job: JobRecord
    bytes: int
    reason: str


def leaving(database: Database, keep_bytes: int | None) -> tuple[Leaving, ...]:
    """Jobs whose files are to be discarded now; keep_bytes: of a tenant whose keys do not say."""
    with database.read() as conn:
        aged = {row.id for row in conn.execute(sa.select(jobs.c.id).where(*_KEPT, *_DUE))}
        limits = _limits(conn)
        if not aged and keep_bytes is None and not any(map(any, limits.values())):
            return ()
        kept = _kept(conn)
        needed = frozenset(users(conn, "job"))
    found: list[Leaving] = []
    for tenant, results in kept.items():
        usual = math.inf if keep_bytes is None else keep_bytes
        most = max(usual if given is None else given for given in limits.get(tenant, [None]))
        found += _of_tenant(results, aged, most, needed)
    return tuple(found)


def _of_tenant(
    results: list[tuple[JobRecord, int]], aged: set[str], most: float, needed: frozenset[str]
) -> Iterator[Leaving]:
    """results: of one tenant, oldest first."""
    total = sum(size for job, size in results if job.id not in aged or job.id in needed)
    for number, (job, size) in enumerate(results, 1):
        if job.id in needed or job.pinned:
            continue
        if job.id in aged:
            yield Leaving(job, size, f"kept for {job.keep_days:g} days")
        elif total > most and number < len(results):
            yield Leaving(
                job, size, f"results of {job.tenant} took {total:,} bytes, {most:,} are kept"
            )
            total -= size


def _limits(conn: sa.Connection) -> dict[str, list[int | None]]:
    """`keep_bytes` of the keys of each tenant that can be used."""
    live = (
        api_keys.c.revoked_at.is_(None),
        sa.or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > db_now()),
    )
    found: dict[str, list[int | None]] = {}
    for tenant, limits in conn.execute(
        sa.select(api_keys.c.tenant, api_keys.c.limits).where(*live)
    ):
        found.setdefault(tenant, []).append(Limits.model_validate(limits).keep_bytes)
    return found


def _kept(conn: sa.Connection) -> dict[str, list[tuple[JobRecord, int]]]:
    """Jobs whose files are kept with their bytes, oldest first, by tenant."""
    size = (
        sa.select(sa.func.coalesce(sa.func.sum(artifacts.c.size), 0))
        .where(artifacts.c.job_id == jobs.c.id)
        .scalar_subquery()
    )
    query = sa.select(size.label("bytes"), *jobs.c).where(*_KEPT)
    found: dict[str, list[tuple[JobRecord, int]]] = {}
    for row in conn.execute(query.order_by(jobs.c.finished_at, jobs.c.id)):
        columns = dict(row._mapping)
        held = int(columns.pop("bytes"))
        found.setdefault(row.tenant, []).append((JobRecord(**columns), held))
    return found
