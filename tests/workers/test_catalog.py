"""Profiles, maps and workers."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from bitmill.config.made_for import MadeFor
from bitmill_workers.store.catalog import Catalog
from bitmill_workers.store.db import Database
from bitmill_workers.store.jobs import JobStore
from bitmill_workers.store.leases import LeaseStore
from bitmill_workers.store.tables import holdings, workers
from stores import QUEUES, spec

pytestmark = pytest.mark.parametrize("dialect", ["sqlite", "postgresql"])


def test_profile_is_registered_once_by_content(catalog: Catalog) -> None:
    for model in ("first", "second"):
        catalog.add_profile("abc", model=model, settings={"seed": 1}, path="profiles/abc")
    record = catalog.profile("abc")
    assert record is not None
    assert (record.model, record.settings) == ("first", {"seed": 1})
    assert [p.id for p in catalog.profiles()] == ["abc"]
    assert catalog.profile("x") is None


def test_map_id_is_the_hash_of_its_content(catalog: Catalog) -> None:
    one = catalog.add_map({"a": "33"}, name="mine")
    same = catalog.add_map({"a": "33"}, name="other")
    two = catalog.add_map({"a": "34"})
    assert same == one
    assert two.id != one.id
    assert sorted(m.id for m in catalog.maps()) == sorted([one.id, two.id])
    assert [m.id for m in catalog.maps(after=min(one.id, two.id))] == [max(one.id, two.id)]


def test_a_map_stored_before_ids_told_models_apart_stays_what_it_was(
    catalog: Catalog, database: Database
) -> None:
    content = {"linears": {"a": "33"}}
    first = MadeFor(shape="a" * 64, weights="b" * 64, model="org/base")
    second = MadeFor(shape="a" * 64, weights="c" * 64, model="org/tuned")
    old = catalog.add_map(content, name="org/base")
    told = {"shape": first.shape, "weights": first.weights}
    with database.write() as conn:
        conn.execute(sa.update(holdings).where(holdings.c.id == old.id).values(told))
    other = catalog.add_map(content, name="org/tuned", model=second)
    assert other.id != old.id
    assert other.parsed().made_for == second
    kept = catalog.map(old.id)
    assert kept is not None
    assert kept.parsed().made_for == first


def test_worker_is_live_for_a_minute_and_shows_its_job(
    catalog: Catalog, database: Database, store: JobStore, leases: LeaseStore
) -> None:
    catalog.beat("w", host="h", queues=("cpu",), device="cpu", version="1")
    started = catalog.workers()[0].started_at
    catalog.beat("w", host="h", queues=("cpu",), device="cpu", version="1")
    job = store.submit(spec()).job
    assert leases.claim_next("w", QUEUES)
    (record,) = catalog.workers()
    assert (record.job_id, record.queues, record.started_at) == (job.id, ("cpu",), started)
    with database.write() as conn:
        conn.execute(sa.update(workers).values(last_seen=0.0))
    assert catalog.workers() == ()
    assert len(catalog.workers(live=False)) == 1
    assert (record.device_free, record.device_total) == (None, None)
    catalog.beat("w", host="h", queues=("cpu",), device="cuda", version="1", memory=(3, 2**36))
    (record,) = catalog.workers()
    assert (record.device_free, record.device_total) == (3, 2**36)
    catalog.leave("w")
    assert catalog.workers(live=False) == ()
