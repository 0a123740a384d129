"""A PostgreSQL server whose processes are stopped while its connections live on."""

from __future__ import annotations

import logging
import threading
import time

import pytest
import sqlalchemy as sa

from bitmill_workers.execution.stop import StopRequest
from bitmill_workers.execution.supervisor import Supervisor
from bitmill_workers.settings import Settings
from bitmill_workers.store import postgres as connections
from bitmill_workers.store.db import DATABASE_ERRORS, Database
from bitmill_workers.store.jobs import JobStore
from servers import Postgres
from stores import spec, wait_for

pytestmark = pytest.mark.parametrize("dialect", ["postgresql"])
MARGIN_S = 3.0
"""What a busy machine may add."""


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the engine is made."""
    monkeypatch.setattr(connections, "IDLE_S", 1.0)
    monkeypatch.setattr(connections, "CONNECT_S", 2)


def answers(store: JobStore) -> bool:
    """Whether the server is heard again."""
    try:
        store.counts()
    except DATABASE_ERRORS:
        return False
    return True


def test_an_idle_connection_and_a_new_one_are_given_up(
    store: JobStore, postgres: Postgres, dialect: str
) -> None:
    store.submit(spec())
    with postgres.frozen():
        began = time.monotonic()
        with pytest.raises(sa.exc.OperationalError, match="timeout expired"):
            store.counts()
        took = time.monotonic() - began
        assert took < connections.IDLE_S + connections.CONNECT_S + MARGIN_S
        began = time.monotonic()
        with pytest.raises(sa.exc.OperationalError, match="did not answer a moment ago"):
            store.counts()
        assert time.monotonic() - began < 0.5
    wait_for(lambda: answers(store), "the server", timeout=connections.HOLD_S + MARGIN_S)
    assert store.counts()["queued"] == 1


def test_a_transaction_that_met_the_freeze_leaves_no_row(
    database: Database,
    store: JobStore,
    postgres: Postgres,
    monkeypatch: pytest.MonkeyPatch,
    dialect: str,
) -> None:
    monkeypatch.setattr(connections, "SILENCE_S", 0.5)
    said = "the database has said nothing for 0.5 s"
    job = store.submit(spec()).job
    change = sa.text("UPDATE jobs SET label = 'half'")
    with pytest.raises(sa.exc.OperationalError, match=said), database.write() as conn:
        conn.execute(change)
        with postgres.frozen():
            conn.execute(sa.text("UPDATE jobs SET priority = 7"))
    kept = store.get(job.id)
    assert (kept.label, kept.priority) == (None, 0)
    with database.write() as conn:  # no lock of the broken connection is left
        conn.execute(change)
    assert store.get(job.id).label == "half"


def test_a_slow_answer_is_waited_for(database: Database, dialect: str) -> None:
    slow = connections.IDLE_S + 1
    with database.read() as conn:
        assert conn.execute(sa.text(f"SELECT 1 FROM pg_sleep({slow})")).scalar_one() == 1


def test_a_job_outlives_a_freeze_that_is_shorter_than_its_lease(
    settings: Settings,
    database: Database,
    postgres: Postgres,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    dialect: str,
) -> None:
    monkeypatch.setattr(connections, "SILENCE_S", 2.0)
    patient = settings.model_copy(update={"lease_s": 60.0})
    supervisor = Supervisor(patient, database)
    job = supervisor.store.submit(spec(label="steps=20")).job

    def complaints() -> list[logging.LogRecord]:
        return [one for one in caplog.records if one.levelno >= logging.WARNING]

    def freeze() -> None:
        wait_for(lambda: list(settings.data.glob("jobs/*/work/step-0")), "the first step")
        with postgres.frozen():
            wait_for(lambda: len(complaints()) > 3, "the supervisor to notice", timeout=30)

    thread = threading.Thread(target=freeze)
    thread.start()
    with StopRequest() as stop:
        assert supervisor.run_next(stop)
    thread.join()
    ended = supervisor.store.get(job.id)
    assert (ended.state, ended.attempt) == ("succeeded", 1)
    events = supervisor.store.events(job.id)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
