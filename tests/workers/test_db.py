"""Transactions on SQLite."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from bitmill_workers.store import db
from bitmill_workers.store.db import Database
from bitmill_workers.store.jobs import JobStore
from bitmill_workers.store.migrate import upgrade
from bitmill_workers.store.tables import QUEUED, jobs
from stores import spec


def test_writer_waits_for_another_and_a_reader_does_not(
    database: Database, store: JobStore
) -> None:
    holding, done = threading.Event(), threading.Event()

    def hold() -> None:
        with database.write():
            holding.set()
            done.wait(5)

    thread = threading.Thread(target=hold)
    thread.start()
    holding.wait()
    assert store.list().jobs == ()
    threading.Timer(0.5, done.set).start()
    began = time.monotonic()
    store.submit(spec())
    assert time.monotonic() - began > 0.3
    thread.join()


def test_lock_that_never_comes_is_an_error(
    database: Database, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "WRITE_TIMEOUT_S", 0.3)
    holding, done = threading.Event(), threading.Event()

    def hold() -> None:
        with database.write():
            holding.set()
            done.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    holding.wait()
    with pytest.raises(sa.exc.OperationalError, match="locked"):
        store.submit(spec())
    done.set()
    thread.join()
    assert store.submit(spec()).job.state == "queued"


def test_damaged_database_is_reported_at_once(tmp_path: Path) -> None:
    place = tmp_path / "broken.db"
    place.write_bytes(b"not a database" * 100)
    broken = Database(f"sqlite:///{place}")
    began = time.monotonic()
    with pytest.raises(sa.exc.DatabaseError), broken.write():
        pass
    assert time.monotonic() - began < 5
    broken.close()


def test_sqlite_finds_the_head_of_the_queue_without_looking_through_it(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/jobs.db")
    upgrade(database)
    rank = sa.select(jobs.c.fair_rank).where(jobs.c.state == QUEUED).order_by(jobs.c.fair_rank)
    with database.read() as conn:
        sql = rank.limit(1).compile(database.engine, compile_kwargs={"literal_binds": True})
        plan = [row[-1] for row in conn.execute(sa.text(f"EXPLAIN QUERY PLAN {sql}"))]
    assert plan == ["SEARCH jobs USING COVERING INDEX ix_jobs_queue_rank (state=?)"]


def test_sqlite_finds_a_position_in_the_queue_by_the_index_of_queued_jobs(
    database: Database, store: JobStore
) -> None:
    job, asked = store.submit(spec()).job, []

    @sa.event.listens_for(database.engine, "before_cursor_execute")
    def note(conn: object, cursor: object, sql: str, values: tuple[str, ...], *_: object) -> None:
        asked.append((sql, values))

    assert store.queues([job]).before == {job.id: 0}
    sql, values = next(one for one in asked if "mine" in one[0])
    with database.read() as conn:
        plan = [row[-1] for row in conn.exec_driver_sql(f"EXPLAIN QUERY PLAN {sql}", values)]
    assert plan[1:] == ["SEARCH jobs USING INDEX ix_jobs_queue_rank (state=?) LEFT-JOIN"]
    assert plan[0].startswith("SEARCH mine USING ")
