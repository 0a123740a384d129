"""API keys: form, storage, expiry, revocation, and whose jobs and maps they reach."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import pytest
import sqlalchemy as sa
from pydantic import ValidationError

from bitmill_workers.errors import KeyNotFound
from bitmill_workers.store.catalog import Catalog
from bitmill_workers.store.db import Database
from bitmill_workers.store.jobs import JobStore
from bitmill_workers.store.keys import KeyRecord, KeyStore, key_id_of
from bitmill_workers.store.limits import Limits, may_use_hub_token
from bitmill_workers.store.tables import api_keys
from stores import spec

pytestmark = pytest.mark.parametrize("dialect", ["sqlite", "postgresql"])


@pytest.fixture
def keys(database: Database) -> KeyStore:
    return KeyStore(database)


def set_key(database: Database, key_id: str, **values: Any) -> None:
    with database.write() as conn:
        conn.execute(sa.update(api_keys).where(api_keys.c.id == key_id).values(values))


def test_only_the_hash_of_a_key_is_stored(keys: KeyStore, database: Database) -> None:
    key, record = keys.create("alice", scopes=["read", "submit"])
    assert re.fullmatch(r"bm_[0-9A-Za-z]{8}_[0-9A-Za-z]{43}_[0-9A-Za-z]{6}", key)
    assert key_id_of(key) == record.id
    with database.read() as conn:
        row = conn.execute(sa.select(api_keys)).one()
    secret = key.split("_")[2]
    assert secret not in str(row)
    assert "sha256" not in {field.name for field in fields(KeyRecord)}
    assert (record.tenant, record.scopes, record.last_used) == ("alice", ("read", "submit"), None)
    other, _ = keys.create("alice", scopes=["read"], tenant="team")
    assert other != key


def test_a_key_is_found_and_its_use_is_noted(keys: KeyStore, database: Database) -> None:
    key, record = keys.create("alice", scopes=["read"])
    assert keys.find(key) is not None
    first = keys.get(record.id).last_used
    assert first is not None
    assert keys.find(key) is not None
    assert keys.get(record.id).last_used == first  # not written at every call
    set_key(database, record.id, last_used=first - 100)
    keys.find(key)
    assert keys.get(record.id).last_used is not None
    assert keys.get(record.id).last_used >= first  # type: ignore[operator]


@pytest.mark.parametrize("change", ["other secret", "cut", "longer", "empty", "other id"])
def test_what_is_not_quite_a_key_is_refused(keys: KeyStore, change: str) -> None:
    key, record = keys.create("alice", scopes=["read"])
    stranger, _ = keys.create("bob", scopes=["read"])
    kind, key_id, secret, check = key.split("_")
    wrong = {
        "other secret": "_".join([kind, key_id, stranger.split("_")[2], check]),
        "cut": key[:-1],
        "longer": key + "0",
        "empty": "",
        "other id": "_".join([kind, stranger.split("_")[1], secret, check]),
    }[change]
    assert keys.find(wrong) is None
    assert keys.get(record.id).last_used is None


def test_a_well_formed_key_with_the_wrong_secret_is_refused(
    keys: KeyStore, database: Database
) -> None:
    key, record = keys.create("alice", scopes=["read"])
    set_key(database, record.id, sha256="0" * 64)
    assert key_id_of(key) == record.id
    assert keys.find(key) is None
    with database.write() as conn:
        conn.execute(sa.delete(api_keys))
    assert keys.find(key) is None


def test_expired_and_revoked_keys_are_refused_and_kept(keys: KeyStore, database: Database) -> None:
    assert not keys.any()
    key, record = keys.create("alice", scopes=["read"], expires_in=3600)
    assert keys.find(key) is not None
    set_key(database, record.id, expires_at=database.now() - 1)
    assert keys.find(key) is None
    assert (keys.any(), keys.any(live=True)) == (True, False)
    key, record = keys.create("alice", scopes=["read"])
    assert keys.any(live=True)
    ended = keys.revoke(record.id)
    assert keys.find(key) is None
    assert keys.revoke(record.id) == ended
    assert [k.name for k in keys.list()] == ["alice", "alice"]
    assert (keys.any(), keys.any(live=True)) == (True, False)
    with pytest.raises(KeyNotFound, match="'nobody00'"):
        keys.revoke("nobody00")


def test_limits_survive_and_say_who_may_spend_the_token(keys: KeyStore) -> None:
    limits = Limits(queued=3, priorities=(-5, 5), hub_repositories=("org/*", "meta/one"))
    _, record = keys.create("alice", scopes=["submit"], limits=limits)
    assert keys.get(record.id).limits == limits
    for repo_id, may in (
        ("org/a", True),
        ("meta/one", True),
        ("meta/two", False),
        ("x/org", False),
    ):
        assert may_use_hub_token(record.scopes, limits, repo_id) is may
    assert may_use_hub_token(["admin"], Limits(), "any/thing")
    for wrong in ((5, -5), (-101, 0), (0, 101), (0, False)):
        with pytest.raises(ValidationError, match=r"must ascend|equal to -?100|valid integer"):
            Limits(priorities=wrong)


def test_profiles_and_maps_are_seen_by_those_who_hold_them(catalog: Catalog) -> None:
    same = {"a": "33"}
    one = catalog.add_map(same, tenant="one")
    catalog.add_map(same, tenant="two")
    mine = catalog.add_map({"a": "34"}, tenant="one")
    catalog.add_profile("p", model="m", settings={}, path="p", tenant="one")
    assert {m.id for m in catalog.maps(tenant="one")} == {one.id, mine.id}
    assert [m.id for m in catalog.maps(tenant="two")] == [one.id]
    assert catalog.map(mine.id, tenant="two") is None
    assert catalog.map(mine.id) is not None
    assert catalog.profile("p", tenant="two") is None
    assert [p.id for p in catalog.profiles(tenant="one")] == ["p"]
    assert catalog.profiles(tenant="two") == ()
    assert len(catalog.maps()) == 2


def test_events_name_the_key_that_asked(store: JobStore) -> None:
    job = store.submit(spec(), created_by="k1").job
    store.request_cancel(job.id, by="k2")
    told = [event.data for event in store.events(job.id)]
    assert told == [{"state": "queued", "by": "k1"}, {"state": "cancelled", "by": "k2"}]
    assert store.get(job.id).created_by == "k1"
