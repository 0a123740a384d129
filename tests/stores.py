"""Helpers for tests of the job store and of workers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa

from bitmill.config.quantization import Budget
from bitmill_workers.job_spec import JobSpec, PathModel
from bitmill_workers.settings import Settings
from bitmill_workers.store.db import Database
from bitmill_workers.store.jobs import JobStore
from bitmill_workers.store.leases import LeaseStore
from bitmill_workers.store.records import JobRecord
from bitmill_workers.store.tables import jobs

T = TypeVar("T")
QUEUES = ("cpu",)


def spec(path: str = "models/tiny", **fields: Any) -> JobSpec:
    """A legal specification that names a model by path."""
    return JobSpec(model=PathModel(path=path), budget=Budget(bits=3.0), **fields)


def set_columns(database: Database, job_id: str, **values: Any) -> None:
    """Change a job's row behind the store's back, e.g. to let its lease expire."""
    with database.write() as conn:
        conn.execute(sa.update(jobs).where(jobs.c.id == job_id).values(values))


def claim(leases: LeaseStore, job_id: str, owner: str = "test") -> JobRecord:
    """Claim this queued job of the queue "cpu", whatever waits before it."""
    database = leases.database
    priority = JobStore(database).get(job_id).priority
    set_columns(database, job_id, priority=1_000_000)
    job = leases.claim_next(owner, QUEUES)
    assert job is not None
    assert job.id == job_id
    set_columns(database, job_id, priority=priority)
    return replace(job, priority=priority)


def wait_for(look: Callable[[], T], what: str, timeout: float = 120.0) -> T:
    """Poll until `look` gives something true; fail the test with `what` after `timeout`."""
    deadline = time.monotonic() + timeout
    while not (found := look()):
        assert time.monotonic() < deadline, f"waited {timeout} s for {what}"
        time.sleep(0.02)
    return found


def alive(pid: int) -> bool:
    """True while a process runs; a zombie does not."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def processes_of(text: str) -> list[int]:
    """Live processes whose command line or environment of arguments mentions `text`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if text in (folder / "cmdline").read_text() and alive(int(folder.name)):
                found.append(int(folder.name))
    return [pid for pid in found if pid != os.getpid()]


def environment_of(settings: Settings) -> dict[str, str]:
    """Environment that gives another process these settings."""
    values = settings.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    named = {}
    for name, value in values.items():
        if name == "queues":
            value = ",".join(value)
        elif isinstance(value, dict):
            value = str(value).replace("'", '"')
        named[f"BITMILL_{name.upper()}"] = str(value)
    return named


def start_worker(settings: Settings, log: Path, *options: str) -> subprocess.Popen[bytes]:
    """A real worker process of its own session; its log goes to `log`."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "bitmill_workers.worker", *options],
            env=os.environ | environment_of(settings),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
