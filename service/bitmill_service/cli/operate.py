"""Commands for those who run a service: prune, backup, restore, and who takes no more jobs."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitmill.errors import InputError
from bitmill.io.atomic import replacing
from bitmill_service.cli.output import (
    JsonFlag,
    UrlOption,
    format_size,
    format_time,
    open_client,
    print_json,
    print_table,
)
from bitmill_service.cli.service import DataOption, make_settings
from bitmill_service.schemas import WorkersView

if TYPE_CHECKING:
    from bitmill_service.settings import ServiceSettings
    from bitmill_workers.store.db import Database
    from bitmill_workers.store.jobs import JobStore
    from bitmill_workers.store.records import Artifact

workers = typer.Typer(help="See workers and queues, and stop them taking jobs.")

QueueOption = Annotated[str | None, typer.Option("--queue", help="A queue, such as gpu-80.")]
WorkerArgument = Annotated[str | None, typer.Argument(metavar="WORKER", help="Name of a worker.")]
_DATABASE = "bitmill.db"
_FOLDERS = ("profiles", "uploads")


@contextmanager
def operators_database(
    data: Any, *, make: bool = False
) -> Iterator[tuple[ServiceSettings, Database]]:
    """The operator's own database. make: in a new data folder too; else that is `InputError`."""
    from bitmill_workers.store.db import Database, errors_told
    from bitmill_workers.store.migrate import require_head, upgrade

    settings = make_settings(data=data)
    if settings.database_url is None and not (settings.data / _DATABASE).is_file():
        if not make:
            raise InputError(
                f"{settings.data.absolute()} is no data folder of a service: it has no "
                f"{_DATABASE}; give the folder with --data or BITMILL_DATA",
                code="no_data_folder",
                param="--data",
            )
        settings.data.mkdir(parents=True, exist_ok=True, mode=0o700)
    with errors_told(settings.database), closing(Database(settings.database)) as database:
        if settings.database_url is None:
            upgrade(database)
        require_head(database)
        yield settings, database


def prune(
    *,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would go, and remove nothing.")
    ] = False,
    data: DataOption = None,
    json: JsonFlag = False,
) -> None:
    """Remove files whose time is over: of jobs, of uploads, of the Hub cache.

    The service does the same by itself every BITMILL_COLLECT_S. Example: bitmill prune --dry-run
    """
    from bitmill_workers.storage.garbage import collect_artifacts, collect_hub, hub_leftovers
    from bitmill_workers.storage.open import open_artifacts
    from bitmill_workers.storage.uploads import collect_uploads
    from bitmill_workers.store.jobs import JobStore
    from bitmill_workers.store.retention import leaving
    from bitmill_workers.store.uploads import UploadStore

    with operators_database(data) as (settings, database):
        jobs, uploads = JobStore(database), UploadStore(database)
        found = [
            ("job", one.job.id, one.bytes, one.reason)
            for one in leaving(database, settings.keep_bytes)
        ]
        hub = hub_leftovers(settings, database)
        found += [("hub", folder.name, size, "least used") for folder, size in hub]
        over = uploads.expire(dry_run=dry_run)
        found += [("upload", upload.id, upload.size, "expired") for upload in over]
        if not dry_run:
            for kind, name, _, reason in found:
                if kind == "job":
                    jobs.discard(name, reason)
            collect_hub(settings, database)
            collect_uploads(settings, uploads)
            collect_artifacts(open_artifacts(settings), database)
    if json:
        rows = [dict(zip(("kind", "name", "bytes", "why"), row, strict=True)) for row in found]
        print_json({"dry_run": dry_run, "found": rows, "bytes": sum(row[2] for row in found)})
        return
    print_table(
        ("kind", "name", "bytes", "why"), [(k, n, format_size(s), why) for k, n, s, why in found]
    )
    would = "would be freed" if dry_run else "freed"
    typer.echo(f"{format_size(sum(row[2] for row in found))} {would}")


def backup(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="New folder for the copy.")],
    *,
    data: DataOption = None,
    json: JsonFlag = False,
) -> None:
    """Copy the jobs, their files, profiles and uploads of a data folder, also while it is served.

    The database is copied as it is at one moment; published files never change, so they fit it.
    Files on the same file system are hard links and take no space. Example: bitmill backup /b/1
    """
    from bitmill_workers.storage.open import open_artifacts
    from bitmill_workers.store.db import Database
    from bitmill_workers.store.jobs import JobStore

    with operators_database(data) as (settings, database):
        if database.dialect != "sqlite":
            raise InputError(
                "the database is PostgreSQL: use pg_dump, and copy the bucket after it "
                "(docs/operations.md)",
                code="not_embedded",
            )
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder} is not empty: name a new folder", param=str(folder))
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # The database gets its name last: a copy that was broken off is no backup.
        with replacing(folder / _DATABASE) as partial:
            with (
                closing(sqlite3.connect(settings.data / _DATABASE)) as source,
                closing(sqlite3.connect(partial)) as target,
            ):
                source.backup(target)
            artifacts = open_artifacts(settings)
            count = size = 0
            missing = []
            with closing(Database(f"sqlite:///{partial.resolve()}")) as copied:
                for file in _published(JobStore(copied)):
                    place = folder / "artifacts" / file.storage_key
                    place.parent.mkdir(parents=True, exist_ok=True)
                    try:
                        artifacts.fetch(file, place)
                    except FileNotFoundError:
                        missing.append(file.storage_key)  # deleted since the database was copied
                        continue
                    count, size = count + 1, size + file.size
            for name in _FOLDERS:
                _copy_folder(settings.data / name, folder / name)
    if json:
        print_json({"folder": str(folder), "files": count, "bytes": size, "missing": missing})
    else:
        typer.echo(f"{count} files ({format_size(size)}) and the database are in {folder}")
        _tell_missing(missing)


def restore(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of `bitmill backup`.")],
    *,
    data: DataOption = None,
    json: JsonFlag = False,
) -> None:
    """Make a new data folder from a backup.

    Example: bitmill restore /b/1 --data /srv/bitmill
    """
    from bitmill_workers.store.db import Database, errors_told
    from bitmill_workers.store.jobs import JobStore
    from bitmill_workers.store.migrate import upgrade

    settings = make_settings(data=data)
    if settings.database_url is not None or settings.s3_bucket is not None:
        raise InputError("only a data folder is restored: docs/operations.md", code="not_embedded")
    if not (folder / _DATABASE).is_file():
        raise InputError(f"{folder} is no backup: it has no {_DATABASE}", param=str(folder))
    if (settings.data / _DATABASE).exists():
        raise InputError(
            f"{settings.data} holds a database already: name a new folder", param="data"
        )
    settings.data.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name in ("artifacts", *_FOLDERS):
        _copy_folder(folder / name, settings.data / name)
    copied = f"sqlite:///{(folder / _DATABASE).resolve()}"
    with errors_told(copied), replacing(settings.data / _DATABASE) as partial:
        shutil.copyfile(folder / _DATABASE, partial)
        with closing(Database(f"sqlite:///{partial.resolve()}")) as database:
            upgrade(database)
            counts = JobStore(database).counts()
            missing = [
                file.storage_key
                for file in _published(JobStore(database))
                if not _is_whole(settings.data / "artifacts" / file.storage_key, file.size)
            ]
    if json:
        found = {"data": str(settings.data.resolve()), "jobs": counts, "missing": missing}
        print_json(found)
    else:
        typer.echo(f"{sum(counts.values())} jobs are in {settings.data}")
        _tell_missing(missing)


def _published(store: JobStore) -> Iterator[Artifact]:
    """The files of all jobs that have succeeded."""
    after = None
    while True:
        page = store.list(state="succeeded", limit=200, after=after)
        for job in page.jobs:
            yield from store.artifacts(job.id)
        if (after := page.after) is None:
            return


def _is_whole(place: Path, size: int) -> bool:
    return place.is_file() and place.stat().st_size == size


def _copy_folder(source: Path, target: Path) -> None:
    """Copy all files below `source`; those that are deleted meanwhile are left out."""

    def unless_gone(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for at, _, names in os.walk(source, onerror=unless_gone, followlinks=True):
        place = target / Path(at).relative_to(source)
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name in names:
            with suppress(FileNotFoundError):
                shutil.copy2(Path(at, name), place / name)


def _tell_missing(missing: list[str]) -> None:
    if missing:
        jobs = len({key.partition("/")[0] for key in missing})
        typer.echo(
            f"warning: {len(missing)} files of {jobs} jobs are not there, or not whole, such as "
            f"{missing[0]}: these jobs cannot be downloaded; --json names all files",
            err=True,
        )


@workers.command("list")
def list_workers(*, url: UrlOption = None, json: JsonFlag = False) -> None:
    """List live workers and all queues; needs an admin's key.

    Example: bitmill workers list
    """
    with open_client(url) as client:
        _show(client.workers(), as_json=json)


@workers.command("pause")
def pause(
    worker: WorkerArgument = None,
    *,
    queue: QueueOption = None,
    url: UrlOption = None,
    json: JsonFlag = False,
) -> None:
    """Let a worker finish its job and take no other, or a queue give out no more jobs.

    A paused worker without a job can be stopped and nothing is lost. Example: bitmill workers
    pause --queue gpu-80
    """
    with open_client(url) as client:
        found = client.pause(**_one(worker, queue))
    _show(found, as_json=json)
    if worker is not None and worker not in {one.name for one in found.workers}:
        typer.echo(
            f"warning: no live worker is called {worker}; one that comes with this name will take "
            "no jobs",
            err=True,
        )


@workers.command("resume")
def resume(
    worker: WorkerArgument = None,
    *,
    queue: QueueOption = None,
    url: UrlOption = None,
    json: JsonFlag = False,
) -> None:
    """Let a worker take jobs again, or a queue give them out.

    Example: bitmill workers resume --queue gpu-80
    """
    with open_client(url) as client:
        _show(client.resume(**_one(worker, queue)), as_json=json)


def _one(worker: str | None, queue: str | None) -> dict[str, str | None]:
    if (worker is None) == (queue is None):
        raise InputError("give a worker or --queue", code="usage")
    return {"worker": worker, "queue": queue}


def _show(found: WorkersView, *, as_json: bool) -> None:
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    print_table(
        ("worker", "queues", "job", "seen", "state"),
        [
            (
                *(w.name, ",".join(w.queues), w.job_id or "-", format_time(w.last_seen)),
                "takes no more jobs" if w.drains else "live",
            )
            for w in found.workers
        ],
    )
    paused = [queue.name for queue in found.queues if queue.paused]
    typer.echo(f"paused queues: {', '.join(paused) or 'none'}")
