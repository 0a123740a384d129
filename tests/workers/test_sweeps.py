"""Sweeps in the job store."""

from __future__ import annotations

import pytest

from bitmill.errors import ModelError
from bitmill_workers.errors import (
    IdempotencyMismatch,
    QuotaExceeded,
    StateConflict,
    SweepNotFound,
)
from bitmill_workers.settings import Settings
from bitmill_workers.storage.garbage import collect_work
from bitmill_workers.store.db import Database
from bitmill_workers.store.jobs import JobStore
from bitmill_workers.store.leases import LeaseStore
from bitmill_workers.store.records import Quota, SweepRecord, new_id
from bitmill_workers.store.sweeps import SweepStore
from stores import QUEUES, set_columns, spec

pytestmark = pytest.mark.parametrize("dialect", ["sqlite", "postgresql"])
CELLS = [(number, spec(seed=number), "cpu") for number in (2, 1, 3)]


def submitted(database: Database, key: str | None = None, **fields: object) -> SweepRecord:
    options = {"label": "study", "tenant": "alice"} | fields
    sweep, _ = SweepStore(database).submit({"grid": {}}, CELLS, idempotency_key=key, **options)  # type: ignore[arg-type]
    return sweep


def test_its_jobs_run_in_the_order_given_and_are_found_by_number(
    database: Database, leases: LeaseStore
) -> None:
    sweep = submitted(database)
    cells = SweepStore(database).cells(sweep.id)
    assert [(n, job.spec["seed"], job.tenant) for n, job in cells.items()] == [
        (n, n, "alice") for n in (1, 2, 3)
    ]
    claimed = [leases.claim_next("w", QUEUES) for _ in CELLS]
    assert [job.cell for job in claimed if job] == [2, 1, 3]


def test_a_key_gives_the_same_sweep_and_refuses_another_body(database: Database) -> None:
    first = submitted(database, "k", request_hash="a")
    assert submitted(database, "k", request_hash="a") == first
    assert len(SweepStore(database).list()) == 1
    assert submitted(database, "k", request_hash="a", tenant="bob") != first
    with pytest.raises(IdempotencyMismatch):
        submitted(database, "k", request_hash="b")


def test_a_quota_takes_all_cells_or_none(database: Database, store: JobStore) -> None:
    with pytest.raises(QuotaExceeded, match="0 jobs of alice are waiting, 3 more"):
        submitted(database, quota=Quota(queued=2))
    assert store.counts() == {}
    assert SweepStore(database).list() == []
    submitted(database, quota=Quota(queued=3))
    assert store.counts() == {"queued": 3}


def test_another_tenant_sees_none(database: Database) -> None:
    sweep = submitted(database)
    sweeps = SweepStore(database)
    assert sweeps.list(tenant="bob") == []
    for call in (sweeps.get, sweeps.request_cancel, sweeps.delete):
        with pytest.raises(SweepNotFound):
            call(sweep.id, tenant="bob")
    assert sweeps.get(sweep.id, tenant="alice") == sweep


def test_cancel_stops_what_has_not_finished_and_may_be_repeated(
    database: Database, leases: LeaseStore
) -> None:
    sweep, sweeps = submitted(database), SweepStore(database)
    failed, running = leases.claim_next("w", QUEUES), leases.claim_next("w", QUEUES)
    assert failed is not None
    assert running is not None
    assert leases.fail(failed.id, failed.token, ModelError("broken"))
    for _ in range(2):
        sweeps.request_cancel(sweep.id, by="key")
    states = {number: job.shown_state for number, job in sweeps.cells(sweep.id).items()}
    assert states == {2: "failed", 1: "cancelling", 3: "cancelled"}
    with pytest.raises(StateConflict, match="unfinished"):
        sweeps.delete(sweep.id)
    assert leases.cancelled(running.id, running.token)
    sweeps.delete(sweep.id)
    assert sweeps.cells(sweep.id) == {}


def test_a_retried_job_takes_the_place_of_its_cell(database: Database, store: JobStore) -> None:
    sweep, sweeps = submitted(database), SweepStore(database)
    again = store.submit(spec(), tenant="alice", cell=(sweep.id, 2)).job
    assert sweeps.cells(sweep.id)[2].id == again.id


def test_shared_stages_stay_until_the_last_job_has_ended(
    database: Database, settings: Settings
) -> None:
    sweep = submitted(database)
    folders = [settings.sweep_folder(name) for name in (sweep.id, new_id(), "mine")]
    for folder in folders:
        folder.mkdir(parents=True)
    assert collect_work(settings, database) == 1
    assert [folder.exists() for folder in folders] == [True, False, True]
    SweepStore(database).request_cancel(sweep.id)
    assert collect_work(settings, database) == 1
    assert [folder.exists() for folder in folders] == [False, False, True]


def test_a_stage_is_made_by_one_attempt_while_its_lease_lasts(
    database: Database, leases: LeaseStore
) -> None:
    sweep, sweeps = submitted(database), SweepStore(database)
    one, two = leases.claim_next("w", QUEUES), leases.claim_next("v", QUEUES)
    assert one is not None
    assert two is not None
    first, second = (one.id, one.token), (two.id, two.token)
    assert sweeps.take_stage(sweep.id, "profile-a", *first) == "mine"
    assert sweeps.take_stage(sweep.id, "profile-a", *first) == "mine"
    assert sweeps.take_stage(sweep.id, "profile-a", *second) == "wait"
    assert sweeps.take_stage(sweep.id, "profile-b", *second) == "mine"
    assert sweeps.take_stage(new_id(), "profile-a", *second) == "mine"
    # Its worker renews the lease no more.
    set_columns(database, one.id, lease_until=0.0)
    assert sweeps.take_stage(sweep.id, "profile-a", *second) == "mine"
    sweeps.stage_made(sweep.id, "profile-a", *first)
    set_columns(database, one.id, lease_until=2e12)
    assert sweeps.take_stage(sweep.id, "profile-a", *first) == "wait"
    sweeps.stage_made(sweep.id, "profile-a", *second)
    assert sweeps.take_stage(sweep.id, "profile-a", *first) == "made"


def test_a_stage_is_free_when_the_job_that_made_it_has_failed_or_begun_anew(
    database: Database, leases: LeaseStore
) -> None:
    sweep, sweeps = submitted(database), SweepStore(database)
    one, two = leases.claim_next("w", QUEUES), leases.claim_next("v", QUEUES)
    assert one is not None
    assert two is not None
    assert sweeps.take_stage(sweep.id, "profile-a", one.id, one.token) == "mine"
    assert sweeps.take_stage(sweep.id, "profile-b", one.id, one.token) == "mine"
    assert leases.hand_back(one.id, one.token, "stopping", retries=3)
    again = leases.claim_next("w", QUEUES)
    assert again is not None
    assert again.id == one.id
    assert sweeps.take_stage(sweep.id, "profile-a", two.id, two.token) == "mine"
    assert sweeps.take_stage(sweep.id, "profile-b", again.id, again.token) == "mine"
    assert leases.fail(again.id, again.token, ModelError("broken"))
    assert sweeps.take_stage(sweep.id, "profile-b", two.id, two.token) == "mine"
    assert sweeps.over() == []
    sweeps.request_cancel(sweep.id)
    assert leases.cancelled(two.id, two.token)
    assert sweeps.over() == [sweep.id]
    sweeps.forget_stages(sweep.id)
    assert sweeps.over() == []
