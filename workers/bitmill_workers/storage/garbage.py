"""Files that no job needs: of dead attempts, of finished and of deleted jobs.

The data folder is a name that somebody typed: only what bears a job's id is ever removed.
"""

from __future__ import annotations

import shutil
import time

import sqlalchemy as sa

from bitmill_workers.settings import Settings
from bitmill_workers.storage.artifacts import ArtifactStore
from bitmill_workers.store.db import Database
from bitmill_workers.store.records import is_id
from bitmill_workers.store.states import ACTIVE, TERMINAL
from bitmill_workers.store.tables import artifacts, jobs

_PROCESSED_S = 3600.0


def collect_artifacts(store: ArtifactStore, database: Database) -> int:
    """Remove stored attempts that no job shows or runs; how many."""
    ours = (place for place in store.attempts() if is_id(place[0]))
    dead = [place for place in ours if not _in_use(database, *place)]
    for job_id, token in dead:
        store.remove(job_id, token)
    return len(dead)


def collect_work(settings: Settings, database: Database) -> int:
    """Remove this machine's work folders of finished and deleted jobs; how many."""
    folders = [f for f in (settings.data / "jobs").glob("*") if is_id(f.name)]
    over = [f for f in folders if _is_over(database, f.name)]
    for folder in over:
        shutil.rmtree(folder, ignore_errors=True)
    return len(over)


def collect_staging(settings: Settings, store: ArtifactStore, database: Database) -> int:
    """Remove this machine's copies of attempts that are not running any more; how many."""
    dead = []
    for place in settings.artifacts_folder.glob("*/*"):
        job_id, name = place.parent.name, place.name
        if is_id(job_id) and name.isdigit() and not _in_use(database, job_id, int(name)):
            dead.append((job_id, int(name)))
    for job_id, token in dead:
        store.drop_local(job_id, token)
    return len(dead)


def prune_broker(settings: Settings) -> None:
    """Remove delivered messages, all of which the file transport keeps."""
    for file in (settings.data / "broker" / "processed").glob("*.msg"):
        if time.time() - file.stat().st_mtime > _PROCESSED_S:
            file.unlink(missing_ok=True)


def _in_use(database: Database, job_id: str, token: int) -> bool:
    with database.read() as conn:
        query = sa.select(jobs.c.state, jobs.c.token).where(jobs.c.id == job_id)
        job = conn.execute(query).one_or_none()
        if job is None or job.token != token:
            return False
        if job.state in ACTIVE:
            return True
        shown = sa.exists().where(
            artifacts.c.job_id == job_id,
            artifacts.c.storage_key.startswith(f"{job_id}/{token}/", autoescape=True),
        )
        return bool(conn.execute(sa.select(shown)).scalar_one())


def _is_over(database: Database, job_id: str) -> bool:
    with database.read() as conn:
        query = sa.select(jobs.c.state).where(jobs.c.id == job_id)
        state = conn.execute(query).scalar_one_or_none()
    return state is None or state in TERMINAL
