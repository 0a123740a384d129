"""What outlives jobs: sensitivity profiles, uploaded bit-width maps, and who is working."""

from __future__ import annotations

from typing import Any, Literal

import sqlalchemy as sa

from bitmill.config.made_for import MadeFor
from bitmill.io.atomic import sha256_json
from bitmill_workers.store.db import Database, db_now
from bitmill_workers.store.needs import User, in_use, refuse_needed
from bitmill_workers.store.queues import ALL_WORKERS, LIVE_WORKERS, read_workers
from bitmill_workers.store.records import MapRecord, ProfileRecord, WorkerRecord
from bitmill_workers.store.states import ACTIVE
from bitmill_workers.store.tables import (
    bit_width_maps,
    holdings,
    jobs,
    pauses,
    profiles,
    workers,
)

LOCAL = "local"
"""The tenant of a service without keys."""

_KINDS: dict[str, Literal["profile", "map"]] = {"profiles": "profile", "bit_width_maps": "map"}


class Catalog:
    """Profiles, maps and workers in the job database."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def add_profile(
        self,
        profile_id: str,
        *,
        model: str,
        settings: dict[str, Any],
        path: str,
        tenant: str = LOCAL,
    ) -> None:
        """Register a profile; one with the same content is already there and stays."""
        row = {"id": profile_id, "model": model, "settings": settings, "path": path}
        self._insert_once(profiles, row, tenant)

    def profile(self, profile_id: str, *, tenant: str | None = None) -> ProfileRecord | None:
        """One profile, or None, also where it is another tenant's."""
        row = self._one(profiles, profile_id, tenant)
        return None if row is None else ProfileRecord(**row._mapping)

    def profiles(
        self, *, tenant: str | None = None, limit: int = 50, after: str | None = None
    ) -> tuple[ProfileRecord, ...]:
        """Profiles by id; `after` is the last id of a former page."""
        rows = self._page(profiles, tenant, limit, after)
        return tuple(ProfileRecord(**row._mapping) for row in rows)

    def add_map(
        self,
        content: dict[str, Any],
        *,
        name: str | None = None,
        tenant: str = LOCAL,
        model: MadeFor | None = None,
    ) -> MapRecord:
        """Store a bit-width map under the hash of its content and of the model that it is of.

        content: without `made_for`, which is what model says.
        """
        told = {} if model is None else model.model_dump(mode="json", exclude_none=True)
        stored = content | {"made_for": told} if told else content
        map_id = sha256_json(stored)[:32]
        self._insert_once(bit_width_maps, {"id": map_id, "name": name, "map": stored}, tenant)
        fingerprint = {half: told[half] for half in ("shape", "weights") if half in told}
        if fingerprint:
            mine = (holdings.c.kind == "map", holdings.c.id == map_id, holdings.c.tenant == tenant)
            with self.database.write() as conn:
                conn.execute(sa.update(holdings).where(*mine).values(fingerprint))
        record = self.map(map_id, tenant=tenant)
        assert record is not None
        return record

    def map(self, map_id: str, *, tenant: str | None = None) -> MapRecord | None:
        """One stored map, or None, also where it is another tenant's."""
        query = _maps(tenant).where(bit_width_maps.c.id == map_id)
        with self.database.read() as conn:
            row = conn.execute(query).one_or_none()
        return None if row is None else MapRecord(**row._mapping)

    def maps(
        self,
        *,
        tenant: str | None = None,
        model: str | None = None,
        limit: int = 50,
        after: str | None = None,
    ) -> tuple[MapRecord, ...]:
        """Stored maps by id; `after` is the last id of a former page. model: one half of the
        fingerprint of the model that they are to be of."""
        query = _maps(tenant).order_by(bit_width_maps.c.id).limit(max(1, min(limit, 200)))
        if after is not None:
            query = query.where(bit_width_maps.c.id > after)
        if model is not None:
            query = query.having(
                sa.or_(
                    sa.func.max(holdings.c.shape) == model, sa.func.max(holdings.c.weights) == model
                )
            )
        with self.database.read() as conn:
            rows = conn.execute(query).all()
        return tuple(MapRecord(**row._mapping) for row in rows)

    def drop(self, kind: Literal["profile", "map"], row_id: str, *, tenant: str | None) -> bool:
        """End a tenant's hold of a profile or a map, or everybody's; True where it is now gone.

        Raises `StateConflict` (code `profile_in_use` or `map_in_use`) where it would go and a job
        works with the profile, or an unfinished one needs the map.
        """
        table = profiles if kind == "profile" else bit_width_maps
        held = (holdings.c.kind == kind, holdings.c.id == row_id)
        mine = (*held, holdings.c.tenant == tenant) if tenant is not None else held
        with self.database.write() as conn:
            conn.execute(sa.select(table.c.id).where(table.c.id == row_id).with_for_update())
            conn.execute(sa.delete(holdings).where(*mine))
            if conn.execute(sa.select(holdings).where(*held).limit(1)).first() is not None:
                return False
            if kind == "map":
                refuse_needed(conn, "map", [row_id], tenant)
            else:
                _refuse_worked_with(conn, row_id, tenant)
            return bool(conn.execute(sa.delete(table).where(table.c.id == row_id)).rowcount)

    def pause(self, kind: Literal["queue", "worker"], name: str, *, by: str | None = None) -> None:
        """Let a queue or a worker take no more jobs; what runs goes on."""
        values = {"kind": kind, "name": name, "at": db_now(), "by": by}
        with self.database.write() as conn:
            conn.execute(self.database.insert(pauses).values(values).on_conflict_do_nothing())

    def resume(self, kind: Literal["queue", "worker"], name: str) -> None:
        """Let it take jobs again."""
        with self.database.write() as conn:
            conn.execute(sa.delete(pauses).where(pauses.c.kind == kind, pauses.c.name == name))

    def paused(self, kind: Literal["queue", "worker"]) -> frozenset[str]:
        """Names of the queues or workers that take no more jobs."""
        with self.database.read() as conn:
            query = sa.select(pauses.c.name).where(pauses.c.kind == kind)
            return frozenset(conn.execute(query).scalars())

    def beat(
        self,
        name: str,
        *,
        host: str,
        queues: tuple[str, ...],
        device: str,
        version: str,
        memory: tuple[int, int] | None = None,
    ) -> None:
        """Note a worker's sign of life. memory: free and total bytes of its devices."""
        free, total = memory or (None, None)
        values = {
            "name": name,
            "host": host,
            "queues": list(queues),
            "device": device,
            "version": version,
            "started_at": db_now(),
            "last_seen": db_now(),
            "device_free": free,
            "device_total": total,
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
        """Workers by name with the job each works on, and how far that is.

        live: only those seen within a minute.
        """
        with self.database.read() as conn:
            return read_workers(conn, LIVE_WORKERS if live else ALL_WORKERS)

    def _insert_once(self, table: sa.Table, values: dict[str, Any], tenant: str) -> None:
        owner = {"tenant": tenant, "kind": _KINDS[table.name], "id": values["id"]}
        with self.database.write() as conn:
            for target, row in ((table, values | {"created_at": db_now()}), (holdings, owner)):
                conn.execute(self.database.insert(target).values(row).on_conflict_do_nothing())

    def _one(self, table: sa.Table, row_id: str, tenant: str | None) -> sa.Row[Any] | None:
        query = _held_by(sa.select(table).where(table.c.id == row_id), table, tenant)
        with self.database.read() as conn:
            return conn.execute(query).one_or_none()

    def _page(
        self, table: sa.Table, tenant: str | None, limit: int, after: str | None
    ) -> list[sa.Row[Any]]:
        query = sa.select(table).order_by(table.c.id).limit(max(1, min(limit, 200)))
        if after is not None:
            query = query.where(table.c.id > after)
        with self.database.read() as conn:
            return list(conn.execute(_held_by(query, table, tenant)).all())


def _refuse_worked_with(conn: sa.Connection, profile_id: str, tenant: str | None) -> None:
    mine = (jobs.c.profile_id == profile_id, jobs.c.state.in_(sorted(ACTIVE)))
    row = conn.execute(sa.select(jobs.c.id, jobs.c.tenant).where(*mine).limit(1)).first()
    if row is not None:
        raise in_use("profile", profile_id, User(row.id, row.tenant), tenant)


def _maps(tenant: str | None) -> sa.Select[Any]:
    """Maps that this tenant holds, or any, with what is known of their models."""
    held = sa.and_(holdings.c.kind == "map", holdings.c.id == bit_width_maps.c.id)
    if tenant is not None:
        held = sa.and_(held, holdings.c.tenant == tenant)
    known = (sa.func.max(holdings.c[name]).label(name) for name in ("shape", "weights"))
    return (
        sa.select(bit_width_maps, *known)
        .select_from(bit_width_maps.join(holdings, held))
        .group_by(bit_width_maps.c.id)
    )


def _held_by(query: sa.Select[Any], table: sa.Table, tenant: str | None) -> sa.Select[Any]:
    """The query, of what this tenant holds; of everything where it is None."""
    if tenant is None:
        return query
    mine = (holdings.c.tenant == tenant, holdings.c.kind == _KINDS[table.name])
    return query.where(sa.exists().where(*mine, holdings.c.id == table.c.id))
