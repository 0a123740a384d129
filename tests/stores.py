"""Helpers for tests of the job store."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from bitmill.spec import Budget, JobSpec, PathModel
from bitmill_workers.db import Database
from bitmill_workers.tables import jobs

QUEUES = ("cpu",)


def spec(path: str = "models/tiny", **fields: Any) -> JobSpec:
    """A legal specification that names a model by path."""
    return JobSpec(model=PathModel(path=path), budget=Budget(bits=3.0), **fields)


def set_columns(database: Database, job_id: str, **values: Any) -> None:
    """Change a job's row behind the store's back, e.g. to let its lease expire."""
    with database.write() as conn:
        conn.execute(sa.update(jobs).where(jobs.c.id == job_id).values(values))
