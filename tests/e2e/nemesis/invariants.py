"""What must hold after any history of faults. Each check returns the violations it found.

I1 every accepted job ended        I2 one commit per job, by the last token
I3 no write by a stale token       I4 never two live runners of a job
I5 visible files match their sums  I6 one key, one job
I7 event numbers have no gaps      I8 nothing is left behind
I9 no secret in logs or stores     I11 no success after a cancel, unless finishing had begun
"""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from pathlib import Path

import sqlalchemy as sa
from stack import CANARY, Stack, request, runners

from bitmill_workers.settings import Settings
from bitmill_workers.store.db import Database
from bitmill_workers.store.jobs import JobStore
from bitmill_workers.store.records import JobRecord
from bitmill_workers.store.states import TRANSITIONS

GRACE_S = 0.5
"""A frozen runner that wakes after its lease may live for moments before its watchdog ends it."""


def check(stack: Stack, settings: Settings, accepted: dict[str, str]) -> dict[str, list[str]]:
    """All checks; `accepted` maps idempotency keys to the job ids that the API answered."""
    database = Database(settings.database)
    store = JobStore(database)
    jobs = [store.get(job_id) for job_id in sorted(set(accepted.values()))]
    found = {
        "I1 lost or unfinished jobs": [f"{j.id} {j.state}" for j in jobs if not j.finished],
        "I2 double commits": _commits(store, jobs),
        "I3 stale writes accepted": _stale(store, jobs, settings),
        "I4 two live runners": _overlaps(settings.data / "lives"),
        "I5 damaged or partial artifacts": _artifacts(stack, store, jobs),
        "I6 keys with two jobs": _keys(database, accepted),
        "I7 gaps in events": _gaps(stack, store, jobs),
        "I8 processes or files left": _leftovers(stack, settings),
        "I9 secrets": _secrets(stack, database),
        "I11 success after cancel": _cancels(jobs),
    }
    database.close()
    return found


def history(store: JobStore, job: JobRecord) -> list[str]:
    """The states that a job went through."""
    events = store.events(job.id, limit=100_000)
    return [e.data["state"] for e in events if e.kind == "state"]


def _commits(store: JobStore, jobs: list[JobRecord]) -> list[str]:
    return [
        f"{j.id} {count}"
        for j in jobs
        if (count := history(store, j).count("succeeded")) != (j.state == "succeeded")
    ]


def _stale(store: JobStore, jobs: list[JobRecord], settings: Settings) -> list[str]:
    """A write by a stale token would show as an illegal step, or as files of another attempt."""
    found = []
    for job in jobs:
        for before, after in itertools.pairwise(history(store, job)):
            if after not in TRANSITIONS[before]:
                found.append(f"{job.id} {before} -> {after}")
        for artifact in store.artifacts(job.id):
            if not artifact.storage_key.startswith(f"{job.id}/{job.token}/"):
                found.append(f"{job.id} shows {artifact.storage_key} with token {job.token}")
        mark = settings.artifacts_folder / job.id / str(job.token) / "attempt.txt"
        if job.state == "succeeded" and mark.read_text() != f"{job.id}/{job.token}":
            found.append(f"{job.id} files of {mark.read_text()}")
    return found


def _overlaps(lives: Path) -> list[str]:
    seen: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in lives.read_text().splitlines():
        job, token, at = line.split()
        seen[job][int(token)].append(float(at))
    found = []
    for job, attempts in seen.items():
        for (one, first), (two, second) in itertools.pairwise(sorted(attempts.items())):
            if max(first) > min(second) + GRACE_S:
                found.append(f"{job} attempts {one} and {two}: {max(first) - min(second):.2f} s")
    return found


def _artifacts(stack: Stack, store: JobStore, jobs: list[JobRecord]) -> list[str]:
    found = []
    for job in jobs:
        files = store.artifacts(job.id)
        if bool(files) != (job.state == "succeeded"):
            found.append(f"{job.id} is {job.state} with {len(files)} files")
        for file in files:
            answer = request(stack, "GET", f"/v1/jobs/{job.id}/files/{file.path}")
            if hashlib.sha256(answer.content).hexdigest() != file.sha256:
                found.append(f"{job.id} {file.path} ({answer.status_code})")
    return found


def _keys(database: Database, accepted: dict[str, str]) -> list[str]:
    from bitmill_workers.store.tables import idempotency

    with database.read() as conn:
        query = sa.select(idempotency.c.key, idempotency.c.job_id)
        stored: dict[str, str] = dict(conn.execute(query).all())
    return [f"{k}: {j} and {stored.get(k)}" for k, j in accepted.items() if stored.get(k) != j]


def _gaps(stack: Stack, store: JobStore, jobs: list[JobRecord]) -> list[str]:
    found = []
    for job in jobs:
        numbers = [e.seq for e in store.events(job.id, limit=100_000)]
        if numbers != list(range(1, job.next_seq)):
            found.append(f"{job.id}: {len(numbers)} events, next {job.next_seq}")
    for job in jobs[:3]:
        page = request(stack, "GET", f"/v1/jobs/{job.id}/events").json()["events"]
        stream = request(
            stack, "GET", f"/v1/jobs/{job.id}/events", headers={"Accept": "text/event-stream"}
        )
        ids = [int(line[3:]) for line in stream.text.splitlines() if line.startswith("id:")]
        if [e["seq"] for e in page] != sorted(set(ids)):
            found.append(f"{job.id}: stream {len(ids)}, page {len(page)}")
    return found


def _leftovers(stack: Stack, settings: Settings) -> list[str]:
    found = [f"process {pid}" for pid in runners(stack)]
    found += [f"folder {f.name}" for f in (settings.data / "jobs").glob("*")]
    database = Database(settings.database)
    store = JobStore(database)
    for folder in settings.artifacts_folder.glob("*/*"):
        job = store.get(folder.parent.name)
        if job.state != "succeeded" or str(job.token) != folder.name:
            found.append(f"artifacts {folder.parent.name}/{folder.name} of a {job.state} job")
    database.close()
    return found


def _secrets(stack: Stack, database: Database) -> list[str]:
    files = [p for p in stack.folder.rglob("*") if p.is_file() and p.stat().st_size < 64 << 20]
    found = [str(p.name) for p in files if CANARY.encode() in p.read_bytes()]
    with database.read() as conn:
        for table in sa.inspect(database.engine).get_table_names():
            for row in conn.exec_driver_sql(f'SELECT * FROM "{table}"'):
                if CANARY in repr(tuple(row)):
                    found.append(f"table {table}")
    return found


def _cancels(jobs: list[JobRecord]) -> list[str]:
    late = []
    for job in jobs:
        asked, finalizing = job.cancel_requested_at, job.finalizing_at
        if job.state != "succeeded" or asked is None:
            continue
        if finalizing is None or asked < finalizing - 2.0:
            late.append(job.id)
    return late
