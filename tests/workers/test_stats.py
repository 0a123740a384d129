"""Numbers for metrics."""

from __future__ import annotations

import pytest

from bitmill.errors import NumericalError
from bitmill_workers.store.db import Database
from bitmill_workers.store.jobs import JobStore
from bitmill_workers.store.leases import LeaseStore
from bitmill_workers.store.records import Artifact
from bitmill_workers.store.stats import read_stats
from stores import set_columns, spec

pytestmark = pytest.mark.parametrize("dialect", ["sqlite", "postgresql"])


def test_stats_of_an_empty_store(database: Database) -> None:
    stats = read_stats(database)
    assert (stats.queues, stats.running, stats.attempts, stats.stage_s) == ({}, {}, 0, {})


def test_stats_count_queues_attempts_and_files(
    database: Database, store: JobStore, leases: LeaseStore
) -> None:
    store.submit(spec())
    done = leases.claim_next("w", ("cpu",))
    assert done is not None
    leases.finalize(done.id, done.token)
    result = {"quality": {"seconds": {"refine": 4.0}}}
    leases.finish(done.id, done.token, result, [Artifact("a", 7, "0" * 64, "k")])
    waiting = store.submit(spec(), queue="gpu-24").job
    set_columns(database, waiting.id, queued_at=database.now() - 50)
    later = store.submit(spec()).job
    set_columns(database, later.id, not_before=database.now() + 50)
    store.submit(spec())
    running = leases.claim_next("w", ("cpu",))
    assert running is not None
    assert not leases.fail(running.id, running.token - 1, NumericalError("y"))
    stats = read_stats(database)
    assert {name: q.depth for name, q in stats.queues.items()} == {"gpu-24": 1}
    assert 49 < stats.queues["gpu-24"].oldest_s < 60
    assert 49 < stats.unsent_s < 60
    assert (stats.running, stats.attempts) == ({"cpu": 1}, 2)
    assert (stats.fenced_writes, stats.artifact_bytes) == (1, 7)
    assert stats.stage_s == {"refine": 4.0}
