"""Claims per second, events written: many processes claim from one database until it is empty.

    python benchmarks/claims.py                              # SQLite in a temporary folder
    python benchmarks/claims.py --database postgresql+psycopg://user@host/empty_database

Refuses to report where a job was claimed twice or not at all.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sqlite3
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from bitmill.config.quantization import Budget
from bitmill_workers.job_spec import JobSpec, PathModel
from bitmill_workers.store.db import Database
from bitmill_workers.store.jobs import JobStore
from bitmill_workers.store.leases import LeaseStore
from bitmill_workers.store.migrate import upgrade
from bitmill_workers.store.tables import job_events

_meeting: list[Any] = []


def _meet(barrier: Any) -> None:
    _meeting.append(barrier)


def claim_all(url: str) -> tuple[list[str], float, float]:
    """One claimer: claim until nothing is left; its claims, and when it began and ended."""
    database = Database(url)
    leases = LeaseStore(database, lease_s=600)
    database.now()
    _meeting[0].wait()
    began, claimed = time.monotonic(), []
    while (job := leases.claim_next(f"claimer-{os.getpid()}", ("cpu",))) is not None:
        claimed.append(job.id)
    database.close()
    return claimed, began, time.monotonic()


def race(url: str, *, jobs: int, claimers: int) -> dict[str, Any]:
    """Submit `jobs`, claim them all with `claimers` processes, check, and report the rate."""
    database = Database(url)
    upgrade(database)
    store = JobStore(database)
    spec = JobSpec(model=PathModel(path="models/m"), budget=Budget(bits=3.0))
    begun = time.monotonic()
    ids = {store.submit(spec, tenant=f"tenant-{n % 10}").job.id for n in range(jobs)}
    submitted = time.monotonic() - begun
    # A server that has run for a minute has statistics; without them it sorts the whole queue.
    with database.write() as conn:
        conn.exec_driver_sql("ANALYZE")
    database.engine.dispose(close=True)
    fork = multiprocessing.get_context("fork")
    meeting = (fork.Barrier(claimers),)
    with ProcessPoolExecutor(claimers, fork, initializer=_meet, initargs=meeting) as pool:
        parts = list(pool.map(claim_all, [url] * claimers))
    claimed = [job for part in parts for job in part[0]]
    with database.read() as conn:
        count = sa.select(sa.func.count()).select_from(job_events)
        events = conn.execute(count.where(job_events.c.seq == 2)).scalar_one()
    database.close()
    if sorted(claimed) != sorted(ids) or events != jobs:
        raise SystemExit(f"{jobs} jobs, {len(claimed)} claims, {len(set(claimed))} distinct")
    seconds = max(p[2] for p in parts) - min(p[1] for p in parts)
    return {
        "jobs": jobs,
        "claimers": claimers,
        "claims_per_second": round(jobs / seconds),
        "submits_per_second": round(jobs / submitted),
        "claims_of_one_claimer": [min(len(p[0]) for p in parts), max(len(p[0]) for p in parts)],
    }


def main() -> None:
    """Measure once and print the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database", help="SQLAlchemy URL of an empty database")
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--claimers", type=int, default=16)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        url = options.database or f"sqlite:///{Path(folder) / 'claims.db'}"
        result = race(url, jobs=options.jobs, claimers=options.claimers)
    versions = {"python": platform.python_version(), "sqlalchemy": sa.__version__}
    name = sa.make_url(url).get_backend_name()
    versions |= {"sqlite": sqlite3.sqlite_version} if name == "sqlite" else {}
    record = {"database": name, **result, "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    sys.stdout.write(json.dumps(record | {"versions": versions}, indent=2) + "\n")


if __name__ == "__main__":
    main()
