"""What outlives jobs: sensitivity profiles, uploaded bit-width maps, and who is working."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from bitmill.io.atomic import sha256_json
from bitmill_workers.store.db import Database, db_now
from bitmill_workers.store.records import MapRecord, ProfileRecord, WorkerRecord
from bitmill_workers.store.states import ACTIVE
from bitmill_workers.store.tables import bit_width_maps, jobs, profiles, workers

WORKER_GONE_S = 60.0
"""A worker that was not seen for this long does not count as live."""


class Catalog:
    """Profiles, maps and workers in the job database."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def add_profile(
        self, profile_id: str, *, model: str, settings: dict[str, Any], path: str
    ) -> None:
        """Register a profile; one with the same content is already there and stays."""
        row = {"id": profile_id, "model": model, "settings": settings, "path": path}
        self._insert_once(profiles, row)

    def profile(self, profile_id: str) -> ProfileRecord | None:
        """One profile, or None."""
        row = self._one(profiles, profile_id)
        return None if row is None else ProfileRecord(**row._mapping)

    def profiles(self, *, limit: int = 50, after: str | None = None) -> tuple[ProfileRecord, ...]:
        """Profiles by id; `after` is the last id of a former page."""
        return tuple(ProfileRecord(**r._mapping) for r in self._page(profiles, limit, after))

    def add_map(self, content: dict[str, Any], *, name: str | None = None) -> MapRecord:
        """Store an uploaded bit-width map under the hash of its content."""
        map_id = sha256_json(content)[:32]
        self._insert_once(bit_width_maps, {"id": map_id, "name": name, "map": content})
        record = self.map(map_id)
        assert record is not None
        return record

    def map(self, map_id: str) -> MapRecord | None:
        """One uploaded map, or None."""
        row = self._one(bit_width_maps, map_id)
        return None if row is None else MapRecord(**row._mapping)

    def maps(self, *, limit: int = 50, after: str | None = None) -> tuple[MapRecord, ...]:
        """Uploaded maps by id; `after` is the last id of a former page."""
        return tuple(MapRecord(**r._mapping) for r in self._page(bit_width_maps, limit, after))

    def beat(
        self,
        name: str,
        *,
        host: str,
        queues: tuple[str, ...],
        device: str,
        version: str,
    ) -> None:
        """Note a worker's sign of life."""
        values = {
            "name": name,
            "host": host,
            "queues": list(queues),
            "device": device,
            "version": version,
            "started_at": db_now(),
            "last_seen": db_now(),
        }
        kept = {k: v for k, v in values.items() if k not in ("name", "started_at")}
        statement = self.database.insert(workers).values(values)
        with self.database.write() as conn:
            conn.execute(
                statement.on_conflict_do_update(index_elements=[workers.c.name], set_=kept)
            )

    def leave(self, name: str) -> None:
        """Forget a worker that stops."""
        with self.database.write() as conn:
            conn.execute(sa.delete(workers).where(workers.c.name == name))

    def workers(self, *, live: bool = True) -> tuple[WorkerRecord, ...]:
        """Workers by name with the job each works on; `live`: only those seen within a minute."""
        job = (
            sa.select(sa.func.min(jobs.c.id))
            .where(jobs.c.owner == workers.c.name, jobs.c.state.in_(sorted(ACTIVE)))
            .scalar_subquery()
        )
        query = sa.select(workers, job.label("job_id")).order_by(workers.c.name)
        if live:
            query = query.where(workers.c.last_seen > db_now() - WORKER_GONE_S)
        with self.database.read() as conn:
            rows = conn.execute(query).all()
        return tuple(WorkerRecord(**(dict(r._mapping) | {"queues": tuple(r.queues)})) for r in rows)

    def _insert_once(self, table: sa.Table, values: dict[str, Any]) -> None:
        statement = self.database.insert(table).values(values | {"created_at": db_now()})
        with self.database.write() as conn:
            conn.execute(statement.on_conflict_do_nothing())

    def _one(self, table: sa.Table, row_id: str) -> sa.Row[Any] | None:
        with self.database.read() as conn:
            return conn.execute(sa.select(table).where(table.c.id == row_id)).one_or_none()

    def _page(self, table: sa.Table, limit: int, after: str | None) -> list[sa.Row[Any]]:
        query = sa.select(table).order_by(table.c.id).limit(max(1, min(limit, 200)))
        if after is not None:
            query = query.where(table.c.id > after)
        with self.database.read() as conn:
            return list(conn.execute(query).all())
