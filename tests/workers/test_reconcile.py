"""One round of the reconciler at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from bitmill_workers.messaging.app import Dispatcher
from bitmill_workers.messaging.reconcile import Reconciler
from bitmill_workers.settings import Settings
from bitmill_workers.store.db import Database
from bitmill_workers.store.jobs import JobStore
from bitmill_workers.store.leases import LeaseStore
from bitmill_workers.store.records import Artifact, JobRecord, new_id
from stores import QUEUES, set_columns, spec, wait_for

pytestmark = pytest.mark.parametrize("dialect", ["sqlite", "postgresql"])


@pytest.fixture
def reconciler(settings: Settings, database: Database, store: JobStore) -> Iterator[Reconciler]:
    dispatcher = Dispatcher(settings, store.mark_sent)
    yield Reconciler(settings, database, dispatcher)
    dispatcher.close()


def claimed(store: JobStore, leases: LeaseStore) -> JobRecord:
    store.submit(spec())
    job = leases.claim_next("w", QUEUES)
    assert job is not None
    return job


def test_expired_lease_queues_the_job_at_once_and_a_live_one_stays(
    reconciler: Reconciler, store: JobStore, leases: LeaseStore, database: Database
) -> None:
    lost, live = claimed(store, leases), claimed(store, leases)
    set_columns(database, lost.id, lease_until=database.now() - 1)
    assert reconciler.expire_leases() == 1
    job = store.get(lost.id)
    assert (job.state, job.lost_count, job.owner) == ("queued", 1, None)
    assert job.not_before <= database.now()
    assert store.events(lost.id)[-1].data["reason"] == "worker w was lost"
    assert store.get(live.id).state == "running"


def test_job_that_always_loses_its_worker_fails_at_the_cap(
    reconciler: Reconciler, store: JobStore, leases: LeaseStore, database: Database
) -> None:
    job = claimed(store, leases)
    for _ in range(reconciler.settings.lost_retries):
        set_columns(database, job.id, lease_until=0.0)
        reconciler.expire_leases()
        set_columns(database, job.id, not_before=0.0)
        assert leases.claim_next("w", QUEUES)
    set_columns(database, job.id, lease_until=0.0)
    reconciler.expire_leases()
    assert (store.get(job.id).state, store.get(job.id).error_code) == ("failed", "worker_lost")


def test_lost_worker_of_a_cancelled_job_ends_it(
    reconciler: Reconciler, store: JobStore, leases: LeaseStore, database: Database
) -> None:
    job = claimed(store, leases)
    leases.finalize(job.id, job.token)
    store.request_cancel(job.id)
    set_columns(database, job.id, lease_until=0.0)
    reconciler.expire_leases()
    assert store.get(job.id).state == "cancelled"


def test_passed_deadline_fails_a_queued_job(
    reconciler: Reconciler, store: JobStore, database: Database
) -> None:
    late = store.submit(spec(deadline_s=1)).job
    early = store.submit(spec(deadline_s=1000)).job
    set_columns(database, late.id, deadline_at=database.now() - 1)
    assert reconciler.expire_deadlines() == 1
    assert (store.get(late.id).state, store.get(late.id).error_code) == ("failed", "deadline")
    assert store.get(early.id).state == "queued"


def test_unsent_jobs_are_sent_and_sent_ones_wait_for_their_message(
    reconciler: Reconciler, store: JobStore, database: Database
) -> None:
    job = store.submit(spec()).job
    later = store.submit(spec()).job
    set_columns(database, later.id, not_before=database.now() + 100)
    assert reconciler.resend() == 1
    assert reconciler.dispatcher.depth("cpu") == 1
    assert reconciler.resend() == 0
    set_columns(database, job.id, sent_at=1.0)
    assert reconciler.resend() == 1
    assert reconciler.dispatcher.depth("cpu") == 1
    for file in (reconciler.settings.data / "broker" / "queue").iterdir():
        file.unlink()
    set_columns(database, job.id, sent_at=1.0)
    assert reconciler.resend() == 1
    assert reconciler.dispatcher.depth("cpu") == 1


def test_garbage_goes_and_visible_or_running_attempts_stay(
    reconciler: Reconciler, store: JobStore, leases: LeaseStore, settings: Settings
) -> None:
    shown, running = claimed(store, leases), claimed(store, leases)
    leases.finalize(shown.id, shown.token)
    leases.finish(shown.id, shown.token, {}, [Artifact("a", 1, "0" * 64, f"{shown.id}/1/a")])
    names = [f"{shown.id}/1", f"{shown.id}/2", f"{running.id}/1", f"{running.id}/0"]
    names.append(f"{new_id()}/1")
    for name in names:
        (settings.artifacts_folder / name).mkdir(parents=True)
    for job in (shown, running):
        (settings.job_folder(job.id) / "work").mkdir(parents=True)
    reconciler.collect_garbage()
    left = {
        str(p.relative_to(settings.artifacts_folder)) for p in settings.artifacts_folder.glob("*/*")
    }
    assert left == {f"{shown.id}/1", f"{running.id}/1"}
    assert [f.name for f in (settings.data / "jobs").iterdir()] == [running.id]


@pytest.mark.parametrize(
    "name",
    [
        "jobs/applications/letter.txt",
        "jobs/letter.txt",
        "jobs/01a22159-7660-7d86-a755-d2a0c81827c3 (copy)/letter.txt",
        "jobs/6ba7b810-9dad-11d1-80b4-00c04fd430c8/letter.txt",
        "artifacts/pottery/1/bowl.jpg",
        "artifacts/2024/12/bowl.jpg",
        "hub/mine.txt",
        "letter.txt",
    ],
)
def test_own_files_in_the_data_folder_are_never_collected(
    reconciler: Reconciler, settings: Settings, name: str
) -> None:
    file = settings.data / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("years of work")
    reconciler.collect_garbage()
    assert file.read_text() == "years of work"


def test_the_loop_outlives_any_failure_of_a_round(
    reconciler: Reconciler,
    store: JobStore,
    leases: LeaseStore,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failed = threading.Event()

    def fail() -> int:
        failed.set()
        raise ValueError("a surprise")

    monkeypatch.setattr(reconciler, "collect_garbage", fail)
    quick = reconciler.settings.model_copy(update={"reconcile_s": 0.01, "collect_s": 0.01})
    monkeypatch.setattr(reconciler, "settings", quick)
    reconciler.start()
    assert failed.wait(60)
    lost = claimed(store, leases)
    set_columns(database, lost.id, lease_until=0.0)
    wait_for(lambda: store.get(lost.id).state == "queued", "the lease to be expired")
    reconciler.stop()


def test_only_one_process_reconciles(reconciler: Reconciler) -> None:
    with reconciler._lock() as first, reconciler._lock() as second:
        assert (first, second) == (True, False)
