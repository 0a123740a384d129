"""The clients' half of the job store."""

from __future__ import annotations

import pytest

from bitmill.errors import NumericalError
from bitmill_workers.errors import IdempotencyMismatch, JobNotFound, StateConflict
from bitmill_workers.store.db import Database
from bitmill_workers.store.jobs import JobStore
from bitmill_workers.store.leases import LeaseStore
from stores import QUEUES, claim, set_columns, spec

pytestmark = pytest.mark.parametrize("dialect", ["sqlite", "postgresql"])


def test_submitted_job_is_queued_with_its_specification(store: JobStore) -> None:
    job = store.submit(spec(label="nightly", deadline_s=50)).job
    assert (job.state, job.model, job.label, job.attempt) == ("queued", "models/tiny", "nightly", 0)
    assert job.spec == spec(label="nightly", deadline_s=50).model_dump(mode="json")
    assert job.deadline_at == pytest.approx(job.created_at + 50, abs=1)
    assert store.get(job.id) == job
    assert [(e.seq, e.kind, e.data) for e in store.events(job.id)] == [
        (1, "state", {"state": "queued"})
    ]


def test_same_key_and_body_gives_the_same_job(store: JobStore) -> None:
    first = store.submit(spec(), idempotency_key="k", request_hash="a")
    again = store.submit(spec(), idempotency_key="k", request_hash="a")
    other = store.submit(spec(), idempotency_key="k", request_hash="a", tenant="else")
    assert again.job == first.job
    assert (first.replayed, again.replayed) == (False, True)
    assert other.job.id != first.job.id


def test_same_key_with_another_body_is_refused(store: JobStore) -> None:
    store.submit(spec(), idempotency_key="k", request_hash="a")
    with pytest.raises(IdempotencyMismatch, match="'k'"):
        store.submit(spec(), idempotency_key="k", request_hash="b")
    assert len(store.list().jobs) == 1


def test_list_is_newest_first_and_pages_without_gaps(store: JobStore) -> None:
    made = [store.submit(spec()).job.id for _ in range(5)]
    first = store.list(limit=2)
    second = store.list(limit=2, after=first.after)
    last = store.list(limit=2, after=second.after)
    seen = [job.id for page in (first, second, last) for job in page.jobs]
    assert seen == sorted(made, reverse=True)
    assert last.after is None


def test_list_filters_by_state_model_label_and_tenant(store: JobStore, leases: LeaseStore) -> None:
    a = store.submit(spec("models/a", label="x"), tenant="one").job
    b = store.submit(spec("models/b"), tenant="two").job
    assert [j.id for j in store.list(model="models/b").jobs] == [b.id]
    assert [j.id for j in store.list(label="x").jobs] == [a.id]
    assert [j.id for j in store.list(tenant="two").jobs] == [b.id]
    claim(leases, a.id)
    assert [j.id for j in store.list(state="running").jobs] == [a.id]
    store.request_cancel(a.id)
    assert store.list(state="running").jobs == ()
    assert [j.id for j in store.list(state="cancelling").jobs] == [a.id]


def test_unknown_job_is_named(store: JobStore) -> None:
    with pytest.raises(JobNotFound, match="nope"):
        store.get("nope")
    job = store.submit(spec(), tenant="one").job
    with pytest.raises(JobNotFound):
        store.get(job.id, tenant="two")


def test_cancel_of_a_queued_job_is_immediate(store: JobStore, leases: LeaseStore) -> None:
    job = store.submit(spec()).job
    assert store.request_cancel(job.id).state == "cancelled"
    assert store.request_cancel(job.id).state == "cancelled"
    assert leases.claim_next("w", QUEUES) is None


def test_cancel_of_a_running_job_waits_for_its_runner(store: JobStore, leases: LeaseStore) -> None:
    job = store.submit(spec()).job
    claimed = leases.claim_next("w", QUEUES)
    assert claimed is not None
    assert store.request_cancel(job.id).shown_state == "cancelling"
    asked = store.request_cancel(job.id)
    assert asked.cancel_requested_at == store.get(job.id).cancel_requested_at
    assert leases.renew(job.id, claimed.token).cancel
    assert leases.cancelled(job.id, claimed.token)
    assert store.get(job.id).shown_state == "cancelled"
    assert [e.kind for e in store.events(job.id)].count("cancel_requested") == 1


def test_cancel_of_a_finished_job_conflicts(store: JobStore, leases: LeaseStore) -> None:
    job = store.submit(spec()).job
    claimed = leases.claim_next("w", QUEUES)
    assert claimed is not None
    assert leases.fail(job.id, claimed.token, NumericalError("it broke"))
    with pytest.raises(StateConflict, match="failed") as caught:
        store.request_cancel(job.id)
    assert caught.value.code == "job_finished"


def test_delete_removes_finished_jobs_whole(store: JobStore) -> None:
    job = store.submit(spec(), idempotency_key="k", request_hash="a").job
    with pytest.raises(StateConflict):
        store.delete(job.id)
    store.request_cancel(job.id)
    store.delete(job.id)
    with pytest.raises(JobNotFound):
        store.get(job.id)
    assert store.events(job.id) == ()
    assert not store.submit(spec(), idempotency_key="k", request_hash="a").replayed


def test_events_page_after_a_number(store: JobStore, leases: LeaseStore) -> None:
    job = store.submit(spec()).job
    claimed = leases.claim_next("w", QUEUES)
    assert claimed is not None
    assert leases.report(job.id, claimed.token, [("metric", {"n": n}) for n in range(4)])
    assert [e.seq for e in store.events(job.id)] == [1, 2, 3, 4, 5, 6]
    assert [e.seq for e in store.events(job.id, after=2, limit=3)] == [3, 4, 5]


def test_log_is_read_by_byte_offset_and_capped(store: JobStore, leases: LeaseStore) -> None:
    job = store.submit(spec()).job
    claimed = leases.claim_next("w", QUEUES)
    assert claimed is not None
    for piece in (b"0123", b"4567", b"89abcdef"):
        assert leases.append_log(job.id, claimed.token, piece, limit=12)
    whole = store.read_log(job.id)
    assert (whole.data, whole.next_offset, whole.size) == (b"0123456789ab", 12, 12)
    middle = store.read_log(job.id, offset=3, limit=4)
    assert (middle.data, middle.next_offset) == (b"3456", 7)
    assert store.read_log(job.id, offset=12).data == b""


def test_tenants_take_turns_whatever_they_have_waiting(store: JobStore, leases: LeaseStore) -> None:
    for _ in range(4):
        store.submit(spec(), tenant="many")
    for _ in range(2):
        claimed = leases.claim_next("w", QUEUES)
        assert claimed is not None
        assert claimed.tenant == "many"
    for _ in range(2):
        store.submit(spec(), tenant="few")
    order = []
    while claimed := leases.claim_next("w", QUEUES):
        order.append(claimed.tenant)
    assert order == ["many", "few", "many", "few"]


def test_priority_comes_before_turns(store: JobStore, leases: LeaseStore) -> None:
    slow = store.submit(spec(), priority=0).job
    urgent = store.submit(spec(), priority=5).job
    assert store.queues([slow, urgent]).before == {urgent.id: 0, slow.id: 1}
    claimed = leases.claim_next("w", QUEUES)
    assert claimed is not None
    assert claimed.id == urgent.id


def test_a_job_alone_stands_where_it_stands_among_all(store: JobStore, leases: LeaseStore) -> None:
    made = [
        store.submit(spec(), tenant=tenant, priority=priority, queue=queue).job
        for tenant, priority, queue in [
            *(("many", 0, "cpu"), ("many", 0, "cpu"), ("few", 0, "cpu"), ("few", 5, "cpu")),
            *(("many", 5, "gpu-80"), ("many", -1, "gpu-80"), ("few", -1, "gpu-80")),
        ]
    ]
    ended = store.submit(spec(), tenant="many", priority=9).job
    store.request_cancel(ended.id)
    together = store.queues(made).before
    assert sorted(together.values()) == [0, 0, 1, 1, 2, 2, 3]
    assert {job.id: store.seen(job.id).queues.before[job.id] for job in made} == together
    assert store.queues([store.get(ended.id)]).before == {}


def test_expired_idempotency_key_can_be_used_again(store: JobStore, database: Database) -> None:
    import sqlalchemy as sa

    from bitmill_workers.store.tables import idempotency

    old = store.submit(spec(), idempotency_key="k", request_hash="a").job
    with database.write() as conn:
        conn.execute(sa.update(idempotency).values(created_at=0.0))
    new = store.submit(spec(), idempotency_key="k", request_hash="b")
    assert not new.replayed
    assert new.job.id != old.id
    set_columns(database, old.id, state="cancelled")
