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
_OF_MAPS = ("name", "shape", "weights")


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
        """Register a profile, which is stored once by content.

        model, settings: what the tenant's job calls it; what its holding says already stays.
        """
        said = {"model": model, "settings": settings}
        self._insert_once(profiles, {"id": profile_id, "path": path}, tenant, said)

    def profile(self, profile_id: str, *, tenant: str | None = None) -> ProfileRecord | None:
        """One profile, or None, also where it is another tenant's."""
        query = _held(profiles, tenant, "model", "settings").where(profiles.c.id == profile_id)
        with self.database.read() as conn:
            row = conn.execute(query).one_or_none()
        return None if row is None else ProfileRecord(**row._mapping)

    def profiles(
        self, *, tenant: str | None = None, limit: int = 50, after: str | None = None
    ) -> tuple[ProfileRecord, ...]:
        """Profiles by id; `after` is the last id of a former page."""
        query = _page(_held(profiles, tenant, "model", "settings"), profiles, limit, after)
        with self.database.read() as conn:
            rows = conn.execute(query).all()
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

        content: without `made_for`, which is what model says. name: what this tenant calls it; a
        name that its holding has already stays.
        """
        told = {} if model is None else model.model_dump(mode="json", exclude_none=True)
        stored = content | {"made_for": told} if told else content
        map_id = sha256_json(stored)[:32]
        said = {"name": name, "shape": told.get("shape"), "weights": told.get("weights")}
        self._insert_once(bit_width_maps, {"id": map_id, "map": stored}, tenant, said)
        record = self.map(map_id, tenant=tenant)
        assert record is not None
        return record

    def map(self, map_id: str, *, tenant: str | None = None) -> MapRecord | None:
        """One stored map, or None, also where it is another tenant's."""
        query = _held(bit_width_maps, tenant, *_OF_MAPS).where(bit_width_maps.c.id == map_id)
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
        held = _held(bit_width_maps, tenant, *_OF_MAPS)
        query = _page(held, bit_width_maps, limit, after)
        if model is not None:
            query = query.where(sa.or_(holdings.c.shape == model, holdings.c.weights == model))
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

    def _insert_once(
        self, table: sa.Table, row: dict[str, Any], tenant: str, said: dict[str, Any]
    ) -> None:
        """Insert the shared row where there is none, and what this tenant says into its holding,
        where that says nothing yet."""
        owner = {"tenant": tenant, "kind": _KINDS[table.name], "id": row["id"]}
        held = self.database.insert(holdings).values(owner | said | {"created_at": db_now()})
        kept = {name: sa.func.coalesce(holdings.c[name], held.excluded[name]) for name in said}
        with self.database.write() as conn:
            conn.execute(self.database.insert(table).values(row).on_conflict_do_nothing())
            conn.execute(
                held.on_conflict_do_update(index_elements=["tenant", "kind", "id"], set_=kept)
            )


def _refuse_worked_with(conn: sa.Connection, profile_id: str, tenant: str | None) -> None:
    mine = (jobs.c.profile_id == profile_id, jobs.c.state.in_(sorted(ACTIVE)))
    row = conn.execute(sa.select(jobs.c.id, jobs.c.tenant).where(*mine).limit(1)).first()
    if row is not None:
        raise in_use("profile", profile_id, User(row.id, row.tenant), tenant)


def _held(table: sa.Table, tenant: str | None, *said: str) -> sa.Select[Any]:
    """Rows that this tenant holds with what its holding says in these columns.

    tenant: None for everybody's, with what the holding that is first says.
    """
    kind = _KINDS[table.name]
    holder: Any = tenant
    if tenant is None:
        others = holdings.alias()
        first = sa.select(others.c.tenant).where(others.c.kind == kind, others.c.id == table.c.id)
        first = first.order_by(others.c.created_at, others.c.tenant).limit(1)
        holder = first.scalar_subquery()
    columns = (holdings.c[name] for name in ("created_at", "tenant", *said))
    mine = (holdings.c.kind == kind, holdings.c.id == table.c.id, holdings.c.tenant == holder)
    return sa.select(table, *columns).where(*mine)


def _page(query: sa.Select[Any], table: sa.Table, limit: int, after: str | None) -> sa.Select[Any]:
    """At most limit rows by id, from the one behind `after`."""
    query = query.order_by(table.c.id).limit(max(1, min(limit, 200)))
    return query if after is None else query.where(table.c.id > after)
