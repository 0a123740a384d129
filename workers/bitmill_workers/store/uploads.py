"""Uploads: folders of files that a client sends in parts, checked, and named by jobs afterwards.

An upload is `open` until every part of every file has come and the whole was checked; then it is
`complete` and does not change, unless its files are lost: announced again, it is open again. The
same files of the same tenant are the same upload, so a client that was cut off finds what it sent.
An upload that nobody uses expires.
"""

from __future__ import annotations

import builtins
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa

from bitmill.io.atomic import sha256_json
from bitmill_workers.errors import QuotaExceeded, UploadNotFound
from bitmill_workers.store.db import Database, db_now
from bitmill_workers.store.jobs import JobStore, kept_bytes
from bitmill_workers.store.needs import refuse_needed, users
from bitmill_workers.store.records import new_id
from bitmill_workers.store.tables import upload_parts, uploads

PART_BYTES = 8 << 20
"""Every part but the last of a file has so many bytes."""


@dataclass(frozen=True, slots=True)
class UploadFile:
    """One announced file: its path, bytes and hex SHA-256."""

    path: str
    size: int
    sha256: str

    @property
    def parts(self) -> int:
        """How many parts it comes in."""
        return -(-self.size // PART_BYTES)

    def part_size(self, number: int) -> int:
        """Bytes of part `number`, counted from 0; 0 where there is none."""
        return max(0, min(PART_BYTES, self.size - number * PART_BYTES)) if number >= 0 else 0


@dataclass(frozen=True, slots=True)
class UploadRecord:
    """One upload. Times are seconds since the epoch."""

    id: str
    tenant: str
    state: Literal["open", "complete"]
    size: int
    files: tuple[UploadFile, ...]
    created_at: float
    created_by: str | None
    expires_at: float

    def missing(self, came: Mapping[str, Sequence[int]]) -> int:
        """Bytes that have not come. came: numbers of the parts that have, by path."""
        if self.state == "complete":
            return 0
        sent = (file.part_size(n) for file in self.files for n in came.get(file.path, ()))
        return self.size - sum(sent)

    def file(self, path: str) -> UploadFile | None:
        """The announced file of this exact path, or None."""
        return next((file for file in self.files if file.path == path), None)


class UploadStore:
    """Uploads in the job database; their bytes are in `bitmill_workers.storage.uploads`."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def find(self, files: Sequence[UploadFile], *, tenant: str) -> UploadRecord | None:
        """The tenant's upload of these files, or None."""
        same = (uploads.c.tenant == tenant, uploads.c.digest == sha256_json(_told(files)))
        with self.database.read() as conn:
            row = conn.execute(sa.select(uploads).where(*same)).one_or_none()
        return None if row is None else _record(row)

    def announce(
        self,
        files: Sequence[UploadFile],
        *,
        tenant: str,
        created_by: str | None = None,
        keep_s: float,
        most_bytes: int | None = None,
    ) -> UploadRecord:
        """The upload of these files, new or begun before, which lives on for `keep_s` at least.

        Raises `QuotaExceeded` (code `quota_bytes`) where the tenant would keep more than it may.
        """
        told = _told(files)
        digest, size = sha256_json(told), sum(f.size for f in files)
        same = (uploads.c.tenant == tenant, uploads.c.digest == digest)
        values = {
            "id": new_id(),
            "tenant": tenant,
            "digest": digest,
            "state": "open",
            "size": size,
            "files": told,
            "created_at": db_now(),
            "created_by": created_by,
            "expires_at": db_now() + keep_s,
        }
        with self.database.write() as conn:
            JobStore(self.database).wait_for_tenant(conn, tenant)
            longer = sa.update(uploads).where(*same, uploads.c.expires_at < db_now() + keep_s)
            conn.execute(longer.values(expires_at=db_now() + keep_s))
            known = conn.execute(sa.select(uploads).where(*same)).one_or_none()
            if known is not None:
                return _record(known)
            held = kept_bytes(conn, tenant)
            if most_bytes is not None and held + size > most_bytes:
                raise QuotaExceeded(
                    f"{tenant} keeps {held:,} bytes; {size:,} more are over its {most_bytes:,}",
                    code="quota_bytes",
                )
            return _record(conn.execute(sa.insert(uploads).values(values).returning(uploads)).one())

    def get(
        self, upload_id: str, *, tenant: str | None = None, complete: bool = False
    ) -> UploadRecord:
        """One upload; raises `UploadNotFound`, also for another tenant's.

        complete: raise it also where the upload is not complete.
        """
        with self.database.read() as conn:
            row = _row(conn, upload_id, tenant)
        if complete and row.state != "complete":
            raise UploadNotFound(upload_id, "is not complete")
        return _record(row)

    def list(self, *, tenant: str | None = None) -> tuple[UploadRecord, ...]:
        """All uploads, oldest first."""
        query = sa.select(uploads).order_by(uploads.c.id)
        if tenant is not None:
            query = query.where(uploads.c.tenant == tenant)
        with self.database.read() as conn:
            return tuple(_record(row) for row in conn.execute(query))

    def received(self, upload_id: str) -> Mapping[str, Sequence[int]]:
        """Numbers of the parts that have come, by path."""
        query = sa.select(upload_parts).where(upload_parts.c.upload_id == upload_id)
        found = defaultdict[str, builtins.list[int]](builtins.list)
        with self.database.read() as conn:
            for row in conn.execute(query.order_by(upload_parts.c.path, upload_parts.c.number)):
                found[row.path].append(row.number)
        return found

    def note_part(self, upload_id: str, path: str, number: int, *, keep_s: float) -> None:
        """A part is stored; the upload lives on for `keep_s`. Raises `UploadNotFound`."""
        part = {"upload_id": upload_id, "path": path, "number": number}
        longer = sa.update(uploads).where(uploads.c.id == upload_id)
        with self.database.write() as conn:
            if not conn.execute(longer.values(expires_at=db_now() + keep_s)).rowcount:
                raise UploadNotFound(upload_id)
            conn.execute(self.database.insert(upload_parts).values(part).on_conflict_do_nothing())

    def forget_parts(self, upload_id: str, paths: Sequence[str]) -> None:
        """These files have to come again. Raises `UploadNotFound`."""
        of_files = (upload_parts.c.upload_id == upload_id, upload_parts.c.path.in_(paths))
        with self.database.write() as conn:
            _row(conn, upload_id, None, lock=True)
            conn.execute(sa.delete(upload_parts).where(*of_files))

    def reopen(
        self, upload_id: str, take_back: Callable[[UploadRecord], Sequence[str] | None]
    ) -> UploadRecord:
        """A complete upload is open again, for files that were lost. Raises `UploadNotFound`.

        take_back: makes the files ready for parts while the upload is locked, and says which need
        not come; None leaves the upload complete.
        """
        with self.database.write() as conn:
            upload = _record(_row(conn, upload_id, None, lock=True))
            came = take_back(upload) if upload.state == "complete" else None
            if came is not None:
                change = sa.update(uploads).where(uploads.c.id == upload_id)
                conn.execute(change.values(state="open"))
                parts = [
                    {"upload_id": upload_id, "path": file.path, "number": number}
                    for file in upload.files
                    if file.path in came
                    for number in range(file.parts)
                ]
                if parts:
                    conn.execute(sa.insert(upload_parts), parts)
        return self.get(upload_id)

    def finish(self, upload_id: str, *, keep_s: float) -> UploadRecord:
        """The upload is whole and checked."""
        done = sa.update(uploads).where(uploads.c.id == upload_id)
        with self.database.write() as conn:
            conn.execute(done.values(state="complete", expires_at=db_now() + keep_s))
            conn.execute(sa.delete(upload_parts).where(upload_parts.c.upload_id == upload_id))
        return self.get(upload_id)

    def delete(self, upload_id: str, *, tenant: str | None = None) -> None:
        """Forget an upload, whose files become garbage.

        Raises `UploadNotFound`, and `StateConflict` (code `upload_in_use`) where an unfinished job
        needs it.
        """
        with self.database.write() as conn:
            _row(conn, upload_id, tenant, lock=True)
            refuse_needed(conn, "upload", [upload_id], tenant)
            conn.execute(sa.delete(uploads).where(uploads.c.id == upload_id))

    def expire(self, *, dry_run: bool = False) -> tuple[UploadRecord, ...]:
        """Forget uploads whose time is over and that no unfinished job needs; which.

        dry_run: only tell.
        """
        query = sa.select(uploads).where(uploads.c.expires_at < db_now()).order_by(uploads.c.id)
        with self.database.write() as conn:
            over = [_record(row) for row in conn.execute(query.with_for_update())]
            if over:
                needed = users(conn, "upload")
                over = [upload for upload in over if upload.id not in needed]
                gone = uploads.c.id.in_([upload.id for upload in over])
                if not dry_run:
                    conn.execute(sa.delete(uploads).where(gone))
        return tuple(over)


def _told(files: Sequence[UploadFile]) -> list[list[Any]]:
    return [[f.path, f.size, f.sha256] for f in sorted(files, key=lambda f: f.path)]


def _row(
    conn: sa.Connection, upload_id: str, tenant: str | None, *, lock: bool = False
) -> sa.Row[Any]:
    query = sa.select(uploads).where(uploads.c.id == upload_id)
    if tenant is not None:
        query = query.where(uploads.c.tenant == tenant)
    row = conn.execute(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        raise UploadNotFound(upload_id)
    return row


def _record(row: sa.Row[Any]) -> UploadRecord:
    return UploadRecord(
        id=row.id,
        tenant=row.tenant,
        state=row.state,
        size=row.size,
        files=tuple(UploadFile(*file) for file in row.files),
        created_at=row.created_at,
        created_by=row.created_by,
        expires_at=row.expires_at,
    )
