"""Claims, leases, fencing and the ends of attempts."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from bitmill.errors import (
    BitmillError,
    CalibrationError,
    InputError,
    ModelError,
    NumericalError,
    ResourceError,
)
from bitmill_workers.store.db import Database
from bitmill_workers.store.jobs import JobStore
from bitmill_workers.store.leases import LeaseStore
from bitmill_workers.store.records import Artifact, JobRecord, Renewal
from bitmill_workers.store.tables import jobs
from stores import QUEUES, set_columns, spec

pytestmark = pytest.mark.parametrize("dialect", ["sqlite", "postgresql"])


KILLED = ResourceError("the runner was ended by signal 9", code="killed", hint="Free memory.")
NO_MEMORY = ResourceError("memory ran out: 2 GiB", code="out_of_memory")


@pytest.fixture
def job(store: JobStore, leases: LeaseStore) -> JobRecord:
    store.submit(spec())
    claimed = leases.claim_next("worker", QUEUES)
    assert claimed is not None
    return claimed


def test_claim_gives_lease_token_and_attempt(job: JobRecord, leases: LeaseStore) -> None:
    assert (job.state, job.owner, job.token, job.attempt) == ("running", "worker", 1, 1)
    assert job.lease_until is not None
    assert job.lease_until - leases.database.now() == pytest.approx(60, abs=2)
    assert leases.claim_next("other", QUEUES) is None


def test_worker_claims_only_its_queues_and_due_jobs(
    store: JobStore, leases: LeaseStore, database: Database
) -> None:
    large = store.submit(spec(), queue="gpu-80").job
    later = store.submit(spec()).job
    set_columns(database, later.id, not_before=database.now() + 100)
    assert leases.claim_next("w", ("cpu", "gpu-24")) is None
    claimed = leases.claim_next("w", ("cpu", "gpu-80"))
    assert claimed is not None
    assert claimed.id == large.id


def test_stale_token_writes_nothing(
    job: JobRecord, store: JobStore, leases: LeaseStore, database: Database
) -> None:
    assert leases.hand_back(job.id, job.token, "test", retries=9)
    newer = leases.claim_next("other", QUEUES)
    assert newer is not None
    assert newer.token == job.token + 1
    file = Artifact("a", 1, "0" * 64, "k")
    assert not leases.renew(job.id, job.token).held
    assert not leases.report(job.id, job.token, [("metric", {})], stage="refine")
    assert not leases.append_log(job.id, job.token, b"x", limit=100)
    assert not leases.finalize(job.id, job.token)
    assert not leases.finish(job.id, job.token, {}, [file])
    assert not leases.fail(job.id, job.token, NumericalError("y"))
    assert not leases.cancelled(job.id, job.token)
    assert not leases.hand_back(job.id, job.token, "z", retries=9)
    after = store.get(job.id)
    assert (after.state, after.owner, after.token, after.stage) == ("running", "other", 2, None)
    assert store.artifacts(job.id) == ()
    assert after.log_size == 0
    fenced = [e.data["target"] for e in store.events(job.id) if e.kind == "fenced"]
    assert fenced == ["finalizing", "succeeded", "failed", "cancelled", "queued"]


def test_log_of_a_worker_that_loses_its_job_meanwhile_is_refused(
    job: JobRecord, store: JobStore, leases: LeaseStore, database: Database
) -> None:
    if database.dialect == "sqlite":
        pytest.skip("writers of SQLite are never concurrent")
    with ThreadPoolExecutor(1) as pool:
        with database.write() as conn:
            mine = jobs.c.id == job.id
            conn.execute(sa.update(jobs).where(mine).values(token=jobs.c.token + 1))
            late = pool.submit(leases.append_log, job.id, job.token, b"old", limit=100)
            with pytest.raises(TimeoutError):
                late.result(timeout=0.5)
        assert not late.result(timeout=60)
    assert leases.append_log(job.id, job.token + 1, b"new", limit=100)
    assert store.read_log(job.id).data == b"new"


def test_any_reason_can_be_stored(job: JobRecord, store: JobStore, leases: LeaseStore) -> None:
    assert leases.fail(job.id, job.token, ModelError("a\0b", param="layers." * 70))
    failed = store.get(job.id)
    assert (failed.error_code, failed.error_hint) == ("invalid_model", ModelError.hint)
    assert failed.error_message == r"a\x00b"
    assert failed.error_param == ("layers." * 70)[:200]
    assert type(failed.error) is ModelError


def test_error_is_stored_whole_and_read_as_its_class(
    job: JobRecord, store: JobStore, leases: LeaseStore
) -> None:
    assert store.get(job.id).error is None
    error = CalibrationError("too short", code="text_too_short", param="calibration", hint="More.")
    assert leases.fail(job.id, job.token, error)
    found = store.get(job.id).error
    assert type(found) is CalibrationError
    assert found.to_dict() == error.to_dict()


def test_error_of_a_row_without_a_class_is_still_read(
    job: JobRecord, store: JobStore, leases: LeaseStore, database: Database
) -> None:
    assert leases.fail(job.id, job.token, InputError("it is 3", code="odd", param="budget"))
    set_columns(database, job.id, error_kind=None, error_hint=None)
    found = store.get(job.id).error
    assert found is not None
    assert (type(found), found.code, found.message) == (BitmillError, "odd", "it is 3")
    assert (found.param, found.hint) == ("budget", None)


def test_finish_shows_files_and_result_once(
    job: JobRecord, store: JobStore, leases: LeaseStore
) -> None:
    file = Artifact("model.safetensors", 7, "0" * 64, "k/model.safetensors")
    assert leases.finalize(job.id, job.token)
    assert store.artifacts(job.id) == ()
    assert leases.finish(job.id, job.token, {"bits": 3}, [file], profile_id="p")
    assert leases.finish(job.id, job.token, {"bits": 4}, [])
    done = store.get(job.id)
    assert (done.state, done.result, done.profile_id) == ("succeeded", {"bits": 3}, "p")
    assert (done.owner, done.lease_until) == (None, None)
    assert store.artifacts(job.id) == (file,)
    assert store.artifact(job.id, "model.safetensors") == file
    assert store.artifact(job.id, "../model.safetensors") is None


def test_success_without_finalizing_is_not_an_edge(
    job: JobRecord, store: JobStore, leases: LeaseStore
) -> None:
    assert not leases.finish(job.id, job.token, {}, [])
    assert store.get(job.id).state == "running"


def test_terminal_states_never_change(job: JobRecord, store: JobStore, leases: LeaseStore) -> None:
    assert leases.fail(job.id, job.token, InputError("message", code="code", param="budget"))
    before = store.get(job.id)
    assert (before.error_code, before.error_message, before.error_param) == (
        "code",
        "message",
        "budget",
    )
    assert not leases.finalize(job.id, job.token)
    assert not leases.hand_back(job.id, job.token, "late", retries=9)
    assert not leases.report(job.id, job.token, [("metric", {})])
    assert store.get(job.id) == before


def test_report_shows_stage_and_progress(
    job: JobRecord, store: JobStore, leases: LeaseStore
) -> None:
    progress = {"stage": "refine", "done": 1, "total": 9, "unit": "block"}
    assert leases.report(
        job.id, job.token, [("progress", progress)], stage="refine", progress=progress
    )
    shown = store.get(job.id)
    assert (shown.stage, shown.progress) == ("refine", progress)


def test_progress_events_stop_at_the_cap_but_the_row_still_moves(
    job: JobRecord, store: JobStore, leases: LeaseStore, database: Database
) -> None:
    set_columns(database, job.id, next_seq=50_000)
    events = [("progress", {"done": 2}), ("stage", {"stage": "pack"})]
    assert leases.report(job.id, job.token, events, progress={"done": 2})
    assert [e.kind for e in store.events(job.id, after=49_999)] == ["stage"]
    assert store.get(job.id).progress == {"done": 2}


def test_crash_is_retried_once_then_fails(
    job: JobRecord, store: JobStore, leases: LeaseStore
) -> None:
    assert leases.retry_crash(job.id, job.token, KILLED, retries=1)
    assert store.get(job.id).state == "queued"
    again = leases.claim_next("w", QUEUES)
    assert again is not None
    assert leases.retry_crash(again.id, again.token, KILLED, retries=1)
    failed = store.get(job.id)
    assert (failed.state, failed.error_code, failed.crash_count) == ("failed", "killed", 2)


def test_out_of_memory_moves_up_one_tier_once(
    job: JobRecord, store: JobStore, leases: LeaseStore
) -> None:
    assert leases.retry_larger(job.id, job.token, "gpu-24", NO_MEMORY)
    assert store.get(job.id).queue == "gpu-24"
    again = leases.claim_next("w", ("gpu-24",))
    assert again is not None
    assert leases.retry_larger(again.id, again.token, "gpu-48", NO_MEMORY)
    failed = store.get(job.id)
    assert (failed.state, failed.error_code, failed.queue) == ("failed", "out_of_memory", "gpu-24")


def test_attempt_that_ends_after_a_cancel_is_cancelled_not_queued(
    job: JobRecord, store: JobStore, leases: LeaseStore
) -> None:
    store.request_cancel(job.id)
    assert leases.hand_back(job.id, job.token, "worker stops", retries=9)
    assert store.get(job.id).state == "cancelled"


def test_later_retries_wait_longer(
    job: JobRecord, store: JobStore, leases: LeaseStore, database: Database
) -> None:
    set_columns(database, job.id, crash_count=3)
    assert leases.retry_crash(job.id, job.token, KILLED, retries=9)
    wait = store.get(job.id).not_before - database.now()
    assert 5 < wait <= 7


def test_deadline_is_reported_at_renewal(
    job: JobRecord, leases: LeaseStore, database: Database
) -> None:
    assert leases.renew(job.id, job.token) == Renewal(held=True)
    assert leases.look(job.id, job.token) == Renewal(held=True)
    set_columns(database, job.id, deadline_at=database.now() - 1)
    assert leases.renew(job.id, job.token).overdue
    assert leases.look(job.id, job.token).overdue


def test_row_that_another_transaction_holds_for_a_moment_is_still_claimed(
    store: JobStore, leases: LeaseStore, database: Database
) -> None:
    job = store.submit(spec()).job
    holding, done = threading.Event(), threading.Event()

    def hold() -> None:
        with database.write() as conn:
            conn.execute(sa.update(jobs).where(jobs.c.id == job.id).values(sent_at=1.0))
            holding.set()
            done.wait(0.3)

    thread = threading.Thread(target=hold)
    thread.start()
    holding.wait()
    claimed = leases.claim_next("w", QUEUES)
    thread.join()
    assert claimed is not None
