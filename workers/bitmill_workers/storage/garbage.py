"""Files that no job needs: of dead attempts, of finished and of deleted jobs.

The data folder is a name that somebody typed: only what bears a job's id is ever removed.
"""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path

import sqlalchemy as sa

from bitmill_workers.settings import Settings
from bitmill_workers.storage.artifacts import STAGES, ArtifactStore
from bitmill_workers.store.db import Database
from bitmill_workers.store.records import is_id
from bitmill_workers.store.states import ACTIVE, TERMINAL
from bitmill_workers.store.sweeps import SweepStore
from bitmill_workers.store.tables import artifacts, jobs

_PROCESSED_S = 3600.0
_log = logging.getLogger(__name__)


def collect_artifacts(store: ArtifactStore, database: Database) -> int:
    """Remove stored attempts that no job shows or runs; how many."""
    ours = (place for place in store.attempts() if is_id(place[0]))
    dead = [place for place in ours if not _in_use(database, *place)]
    for job_id, token in dead:
        store.remove(job_id, token)
    return len(dead)


def collect_stages(store: ArtifactStore, database: Database) -> int:
    """Remove what jobs of finished and deleted sweeps made for each other; of how many sweeps."""
    sweeps = SweepStore(database)
    over = sweeps.over()
    for sweep_id in over:
        store.remove_folder(STAGES, sweep_id)
        sweeps.forget_stages(sweep_id)
    return len(over)


def collect_work(settings: Settings, database: Database) -> int:
    """Remove this machine's work folders of finished and deleted jobs and sweeps; how many."""
    folders = [f for f in (settings.data / "jobs").glob("*") if is_id(f.name)]
    over = [f for f in folders if _is_over(database, f.name)]
    shared = [f for f in (settings.data / "sweeps").glob("*") if is_id(f.name)]
    over += [f for f in shared if not SweepStore(database).at_work(f.name)]
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


def hub_leftovers(settings: Settings, database: Database) -> list[tuple[Path, int]]:
    """Cached Hub repositories over `hub_cache_bytes`, least used first, with their bytes.

    None that an unfinished job names.
    """
    most = settings.hub_cache_bytes
    if most is None or not settings.hub_cache.is_dir():
        return []
    unfinished = sa.select(jobs.c.model).where(jobs.c.state.not_in(sorted(TERMINAL)))
    with database.read() as conn:
        named = [str(model) for model in conn.execute(unfinished).scalars()]
    found = []
    for folder in settings.hub_cache.glob("models--*"):
        files = [f.lstat() for f in folder.rglob("*") if f.is_file() and not f.is_symlink()]
        used = max((max(f.st_atime, f.st_mtime) for f in files), default=0.0)
        found.append((used, folder, sum(f.st_size for f in files)))
    over = sum(size for _, _, size in found) - most
    leaving = []
    for _, folder, size in sorted(found):
        repo = folder.name.removeprefix("models--").replace("--", "/")
        if over <= 0:
            break
        if not any(model == repo or model.startswith((f"{repo}@", f"{repo}/")) for model in named):
            leaving.append((folder, size))
            over -= size
    return leaving


def collect_hub(settings: Settings, database: Database) -> int:
    """Remove cached Hub repositories over the limit; how many."""
    leaving = hub_leftovers(settings, database)
    for folder, size in leaving:
        _log.info("removing %s of the Hub cache, %d bytes", folder.name, size)
        shutil.rmtree(folder, ignore_errors=True)
    return len(leaving)


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
