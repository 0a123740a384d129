"""What a tenant may have at most, with many asking at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from bitmill_workers.errors import QuotaExceeded
from bitmill_workers.store.jobs import JobStore
from bitmill_workers.store.leases import LeaseStore
from bitmill_workers.store.records import Artifact, JobRecord, Quota
from stores import QUEUES, spec

pytestmark = pytest.mark.parametrize("dialect", ["sqlite", "postgresql"])


def test_no_more_jobs_wait_than_may_however_many_ask_at_once(store: JobStore) -> None:
    def ask(number: int) -> str:
        try:
            key = None if number % 2 else f"key-{number}"
            tenant = "alice" if number % 3 else "bob"
            store.submit(spec(), tenant=tenant, quota=Quota(queued=3), idempotency_key=key)
        except QuotaExceeded as refused:
            return f"{refused.code}: {refused.message[-15:]}"
        return tenant

    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(ask, range(24)))
    assert {code: told.count(code) for code in set(told)} == {
        "alice": 3,
        "bob": 3,
        "quota_queued: , at most 3 may": 18,
    }


def test_a_repeated_submission_is_no_further_job(store: JobStore) -> None:
    quota = Quota(queued=1)
    first = store.submit(spec(), idempotency_key="one", quota=quota)
    again = store.submit(spec(), idempotency_key="one", quota=quota)
    assert (again.job.id, again.replayed) == (first.job.id, True)


def test_no_more_jobs_run_than_may_and_others_go_on(store: JobStore, leases: LeaseStore) -> None:
    for _ in range(6):
        store.submit(spec(), tenant="alice", quota=Quota(running=2))
    for _ in range(2):
        store.submit(spec(), tenant="bob")
    with ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(lambda n: leases.claim_next(f"w{n}", QUEUES), range(8)))
    mine = [job for job in claimed if job is not None and job.tenant == "alice"]
    assert [len(mine), sum(job is not None for job in claimed)] == [2, 4]
    assert leases.claim_next("w", QUEUES) is None
    assert leases.hand_back(mine[0].id, mine[0].token, "test", retries=9)
    again = leases.claim_next("w", QUEUES)
    assert again is not None
    assert again.tenant == "alice"
    assert leases.claim_next("w", QUEUES) is None


def test_kept_bytes_are_the_tenants_own(store: JobStore, leases: LeaseStore) -> None:
    def finished(tenant: str) -> JobRecord:
        store.submit(spec(), tenant=tenant)
        job = leases.claim_next("w", QUEUES)
        assert job is not None
        assert leases.finalize(job.id, job.token)
        files = [Artifact("a", 600, "0" * 64, f"{job.id}/1/a")]
        assert leases.finish(job.id, job.token, {}, files)
        return job

    mine = finished("alice")
    finished("bob")
    assert (store.kept_bytes("alice"), store.kept_bytes("carl")) == (600, 0)
    store.submit(spec(), tenant="alice", quota=Quota(bytes=601))
    with pytest.raises(QuotaExceeded, match="keeps 600 bytes, at most 600") as refused:
        store.submit(spec(), tenant="alice", quota=Quota(bytes=600))
    assert refused.value.code == "quota_bytes"
    store.delete(mine.id)
    store.submit(spec(), tenant="alice", quota=Quota(bytes=600))
