"""The store against a model in memory: random histories of claims, losses, cancels and ends.

Every operation must answer what the model predicts, terminal states must never change, and event
numbers must have no gaps, on both databases.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    rule,
    run_state_machine_as_test,
)

from bitmill.errors import NumericalError
from bitmill_workers.errors import StateConflict
from bitmill_workers.messaging.app import Dispatcher
from bitmill_workers.messaging.reconcile import Reconciler
from bitmill_workers.settings import Settings
from bitmill_workers.store.db import Database
from bitmill_workers.store.jobs import JobStore
from bitmill_workers.store.leases import LeaseStore
from bitmill_workers.store.states import ACTIVE, TERMINAL
from bitmill_workers.store.tables import jobs
from stores import spec

pytestmark = pytest.mark.parametrize("dialect", ["sqlite", "postgresql"])
RETRIES = 2


@dataclass
class Expected:
    """What the model knows of a job."""

    order: int
    tenant: str
    rank: int
    state: str = "queued"
    token: int = 0
    cancel: bool = False
    lost: int = 0
    handed: int = 0


class StoreMachine(RuleBasedStateMachine):
    """One history on a database whose tables were emptied."""

    claims = Bundle("claims")

    def __init__(self, database: Database, reconciler: Reconciler) -> None:
        super().__init__()
        with database.write() as conn:
            conn.execute(sa.delete(jobs))
        self.database = database
        self.store = JobStore(database)
        self.leases = LeaseStore(database, lease_s=600)
        self.reconciler = reconciler
        self.model: dict[str, Expected] = {}
        self.keys: dict[str, str] = {}
        self.ended: dict[str, Any] = {}

    @rule(tenant=st.sampled_from("ab"), key=st.sampled_from([None, "k1", "k2"]))
    def submit(self, tenant: str, key: str | None) -> None:
        made = self.store.submit(spec(), tenant=tenant, idempotency_key=key and tenant + key)
        if key is not None and tenant + key in self.keys:
            assert made.replayed
            assert made.job.id == self.keys[tenant + key]
            return
        assert not made.replayed
        if key is not None:
            self.keys[tenant + key] = made.job.id
        queued = [e.rank for e in self.model.values() if e.state == "queued"]
        ranks = [e.rank for e in self.model.values()]
        mine = [e.rank + 1 for e in self.model.values() if e.tenant == tenant]
        virtual = min(queued) if queued else max(ranks, default=0)
        rank = max([virtual, *mine])
        self.model[made.job.id] = Expected(len(self.model), tenant, rank)

    @rule(target=claims)
    def claim(self) -> tuple[str, int]:
        claimed = self.leases.claim_next("w", ("cpu",))
        waiting = [(e.rank, e.order, i) for i, e in self.model.items() if e.state == "queued"]
        if not waiting:
            assert claimed is None
            return ("none", 0)
        assert claimed is not None
        best = min(waiting)[0]
        assert self.model[claimed.id].rank == best
        expected = self.model[claimed.id]
        self.model[claimed.id] = replace(expected, state="running", token=expected.token + 1)
        assert claimed.token == expected.token + 1
        return (claimed.id, claimed.token)

    def holds(self, claim: tuple[str, int], *states: str) -> bool:
        expected = self.model.get(claim[0])
        return (
            expected is not None
            and expected.token == claim[1]
            and expected.state in (states or ("running", "finalizing"))
        )

    def repeats(self, claim: tuple[str, int], state: str) -> bool:
        """A repetition of a write that committed is answered as the first was."""
        expected = self.model.get(claim[0])
        return expected is not None and (expected.token, expected.state) == (claim[1], state)

    def enter(self, claim: tuple[str, int], state: str, **changes: Any) -> None:
        self.model[claim[0]] = replace(self.model[claim[0]], state=state, **changes)

    @rule(claim=claims)
    def renew(self, claim: tuple[str, int]) -> None:
        answer = self.leases.renew(*claim)
        assert answer.held == self.holds(claim)
        assert answer == self.leases.look(*claim)
        assert answer.cancel == (answer.held and self.model[claim[0]].cancel)

    @rule(claim=claims)
    def report(self, claim: tuple[str, int]) -> None:
        assert self.leases.report(*claim, [("metric", {})]) == self.holds(claim)

    @rule(claim=claims)
    def finalize(self, claim: tuple[str, int]) -> None:
        fits, again = self.holds(claim, "running"), self.repeats(claim, "finalizing")
        assert self.leases.finalize(*claim) == (fits or again)
        if fits:
            self.enter(claim, "finalizing")

    @rule(claim=claims)
    def finish(self, claim: tuple[str, int]) -> None:
        fits, again = self.holds(claim, "finalizing"), self.repeats(claim, "succeeded")
        assert self.leases.finish(*claim, {}, []) == (fits or again)
        if fits:
            self.enter(claim, "succeeded")

    @rule(claim=consumes(claims))
    def fail(self, claim: tuple[str, int]) -> None:
        fits, again = self.holds(claim), self.repeats(claim, "failed")
        assert self.leases.fail(*claim, NumericalError("message")) == (fits or again)
        if fits:
            self.enter(claim, "failed")

    @rule(claim=claims)
    def cancelled(self, claim: tuple[str, int]) -> None:
        fits = self.holds(claim) and self.model[claim[0]].cancel
        assert self.leases.cancelled(*claim) == (fits or self.repeats(claim, "cancelled"))
        if fits:
            self.enter(claim, "cancelled")

    @rule(claim=claims)
    def hand_back(self, claim: tuple[str, int]) -> None:
        fits, again = self.holds(claim), self.repeats(claim, "queued")
        assert self.leases.hand_back(*claim, "stopping", retries=RETRIES) == (fits or again)
        if fits:
            expected = self.model[claim[0]]
            self.end_attempt(claim[0], expected.handed, handed=expected.handed + 1)

    def end_attempt(self, job_id: str, used: int, **counted: int) -> None:
        expected = self.model[job_id]
        if expected.cancel:
            self.model[job_id] = replace(expected, state="cancelled")
        elif used < RETRIES:
            self.model[job_id] = replace(expected, state="queued", **counted)
        else:
            self.model[job_id] = replace(expected, state="failed", **counted)

    @rule(claim=claims)
    def lose(self, claim: tuple[str, int]) -> None:
        """The worker's lease expires and the reconciler finds it."""
        with self.database.write() as conn:
            held = sa.and_(jobs.c.id == claim[0], jobs.c.state.in_(sorted(ACTIVE)))
            conn.execute(sa.update(jobs).where(held).values(lease_until=1.0))
        expected = self.model.get(claim[0])
        active = expected is not None and expected.state in ACTIVE
        assert self.reconciler.expire_leases() == active
        with self.database.write() as conn:
            queued = jobs.c.state == "queued"
            conn.execute(sa.update(jobs).where(queued).values(not_before=0.0))
        if active:
            assert expected is not None
            self.end_attempt(claim[0], expected.lost, lost=expected.lost + 1)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if not self.model:
            return
        job_id = data.draw(st.sampled_from(sorted(self.model)))
        expected = self.model[job_id]
        if expected.state in ("succeeded", "failed"):
            with pytest.raises(StateConflict):
                self.store.request_cancel(job_id)
            return
        self.store.request_cancel(job_id)
        if expected.state == "queued":
            self.model[job_id] = replace(expected, state="cancelled")
        elif expected.state in ACTIVE:
            self.model[job_id] = replace(expected, cancel=True)

    @invariant()
    def rows_are_as_expected(self) -> None:
        for job_id, expected in self.model.items():
            job = self.store.get(job_id)
            assert (job.state, job.token) == (expected.state, expected.token)
            assert (job.lost_count, job.handback_count) == (expected.lost, expected.handed)
            assert (job.owner is None) == (job.state not in ACTIVE)
            if job.state in TERMINAL:
                assert self.ended.setdefault(job_id, job) == job

    def teardown(self) -> None:
        for job_id in self.model:
            numbers = [e.seq for e in self.store.events(job_id, limit=10_000)]
            assert numbers == list(range(1, self.store.get(job_id).next_seq))


def test_store_behaves_like_its_model(settings: Settings, database: Database) -> None:
    patient = settings.model_copy(update={"lost_retries": RETRIES})
    dispatcher = Dispatcher(patient, lambda _: None)
    reconciler = Reconciler(patient, database, dispatcher)
    bounds = hypothesis_settings(
        max_examples=20,
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(lambda: StoreMachine(database, reconciler), settings=bounds)
    dispatcher.close()
