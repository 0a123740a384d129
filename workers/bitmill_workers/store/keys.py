"""API keys: who may do what, and how much of it.

A key is `bm_<id>_<secret>_<checksum>`: 8 characters that name it, 256 random bits, and a CRC-32 of
what stands before it, all base 62. The checksum tells a typing error, or another service's token,
without a look at the database. Stored is the SHA-256 of the whole key, which is enough for a secret
of 256 random bits; the key itself is shown once, when it is made.

A key acts for its tenant, and sees the jobs of that tenant alone unless it has the scope admin.
Rows are kept after a key is revoked, so that its id in events and logs keeps its meaning, and so
that a service which has had a key never stands open again.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from bitmill_workers.errors import KeyNotFound
from bitmill_workers.store.db import Database, db_now
from bitmill_workers.store.limits import Limits, Scope
from bitmill_workers.store.tables import api_keys

_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_FORM = re.compile(r"(bm_([0-9A-Za-z]{8})_[0-9A-Za-z]{43})_([0-9A-Za-z]{6})")
_USE_S = 60.0
"""The time of a key's last use is noted at most this often."""


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key without its secret. Times are seconds since the epoch."""

    id: str
    name: str
    tenant: str
    scopes: tuple[Scope, ...]
    limits: Limits
    created_at: float
    created_by: str | None
    expires_at: float | None
    last_used: float | None
    revoked_at: float | None


class KeyStore:
    """Keys in the job database."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def create(
        self,
        name: str,
        *,
        scopes: Sequence[Scope],
        tenant: str | None = None,
        expires_in: float | None = None,
        limits: Limits | None = None,
        created_by: str | None = None,
    ) -> tuple[str, KeyRecord]:
        """A new key, which nobody can read again, and its record.

        tenant: default is the name, so that a key made to replace another sees the same jobs.
        expires_in: seconds.
        """
        key_id = "".join(secrets.choice(_DIGITS) for _ in range(8))
        body = f"bm_{key_id}_{_base62(secrets.randbits(256), 43)}"
        key = f"{body}_{_checksum(body)}"
        values = {
            "id": key_id,
            "name": name,
            "tenant": tenant or name,
            "sha256": _hash(key),
            "scopes": list(scopes),
            "limits": (limits or Limits()).model_dump(mode="json"),
            "created_at": db_now(),
            "created_by": created_by,
            "expires_at": None if expires_in is None else db_now() + expires_in,
        }
        with self.database.write() as conn:
            row = conn.execute(sa.insert(api_keys).values(values).returning(*api_keys.c)).one()
        return key, _record(row)

    def find(self, key: str) -> KeyRecord | None:
        """The record of a key that may be used now, and note that it was; None for any other."""
        key_id = key_id_of(key)
        if key_id is None:
            return None
        query = sa.select(api_keys, db_now().label("now")).where(api_keys.c.id == key_id)
        with self.database.read() as conn:
            row = conn.execute(query).one_or_none()
        # Compared also where there is no such id, so that the time tells nothing about ids.
        stored = "" if row is None else row.sha256
        if not hmac.compare_digest(_hash(key), stored) or row is None:
            return None
        if row.revoked_at is not None or (row.expires_at or row.now + 1) <= row.now:
            return None
        if row.last_used is None or row.last_used < row.now - _USE_S:
            with self.database.write() as conn:
                used = sa.update(api_keys).where(api_keys.c.id == key_id)
                conn.execute(used.values(last_used=db_now()))
        return _record(row)

    def get(self, key_id: str) -> KeyRecord:
        """One key, revoked or not; raises `KeyNotFound`."""
        with self.database.read() as conn:
            row = conn.execute(sa.select(api_keys).where(api_keys.c.id == key_id)).one_or_none()
        if row is None:
            raise KeyNotFound(key_id)
        return _record(row)

    def list(self) -> tuple[KeyRecord, ...]:
        """All keys, oldest first, revoked ones too."""
        query = sa.select(api_keys).order_by(api_keys.c.created_at, api_keys.c.id)
        with self.database.read() as conn:
            return tuple(_record(row) for row in conn.execute(query))

    def revoke(self, key_id: str) -> KeyRecord:
        """End a key; repeating it changes nothing. Raises `KeyNotFound`."""
        live = sa.update(api_keys).where(api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None))
        with self.database.write() as conn:
            conn.execute(live.values(revoked_at=db_now()))
        return self.get(key_id)

    def any(self, *, live: bool = False) -> bool:
        """Whether a key was ever made; `live`: whether one can be used now."""
        query = sa.select(api_keys.c.id)
        if live:
            unexpired = sa.or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > db_now())
            query = query.where(api_keys.c.revoked_at.is_(None), unexpired)
        with self.database.read() as conn:
            return conn.execute(query.limit(1)).one_or_none() is not None


def key_id_of(key: str) -> str | None:
    """The id in a well-formed key; None for anything else, a mistyped key among them."""
    match = _FORM.fullmatch(key)
    if match is None or _checksum(match[1]) != match[3]:
        return None
    return match[2]


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _checksum(body: str) -> str:
    return _base62(zlib.crc32(body.encode()), 6)


def _base62(value: int, digits: int) -> str:
    found = ""
    for _ in range(digits):
        value, digit = divmod(value, 62)
        found = _DIGITS[digit] + found
    return found


def _record(row: sa.Row[Any]) -> KeyRecord:
    return KeyRecord(
        id=row.id,
        name=row.name,
        tenant=row.tenant,
        scopes=tuple(row.scopes),
        limits=Limits.model_validate(row.limits),
        created_at=row.created_at,
        created_by=row.created_by,
        expires_at=row.expires_at,
        last_used=row.last_used,
        revoked_at=row.revoked_at,
    )
