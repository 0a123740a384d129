"""Puts right what a lost process, message or file left behind; one instance at a time does it.

Jobs whose lease has expired run again, waiting jobs are announced again, passed deadlines fail
their jobs, and files of dead attempts are removed. It runs in every API process under a lock.
"""

from __future__ import annotations

import fcntl
import logging
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa

from bitmill_workers.errors import DeadlinePassed, WorkerLost
from bitmill_workers.messaging.app import Dispatcher
from bitmill_workers.messaging.webhooks import WebhookSender
from bitmill_workers.settings import Settings
from bitmill_workers.storage.artifacts import UPLOADS, ArtifactStore
from bitmill_workers.storage.garbage import (
    collect_artifacts,
    collect_hub,
    collect_stages,
    collect_work,
    prune_broker,
)
from bitmill_workers.storage.open import open_artifacts
from bitmill_workers.storage.uploads import collect_uploads
from bitmill_workers.store.db import Database, db_now
from bitmill_workers.store.jobs import IDEMPOTENCY_S, JobStore
from bitmill_workers.store.leases import requeue
from bitmill_workers.store.records import error_columns
from bitmill_workers.store.retention import leaving
from bitmill_workers.store.states import ACTIVE
from bitmill_workers.store.tables import idempotency, jobs
from bitmill_workers.store.transitions import transition
from bitmill_workers.store.uploads import UploadStore

_log = logging.getLogger(__name__)
_BATCH = 100
_STOP_S = 3.0
_LOCK = 0x6269746E


class Reconciler:
    """The reconciling loop; `start` runs it in a thread, `run_once` does one round."""

    def __init__(self, settings: Settings, database: Database, dispatcher: Dispatcher) -> None:
        self.settings = settings
        self.database = database
        self.dispatcher = dispatcher
        self.store = JobStore(database)
        self.uploads = UploadStore(database)
        self.artifacts: ArtifactStore = open_artifacts(settings)
        self._webhooks = WebhookSender(settings, database)
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Reconcile every `reconcile_s` until `stop`, whenever this process holds the lock."""
        for target, name in ((self._loop, "reconciler"), (self._deliver, "webhooks")):
            self._threads.append(threading.Thread(target=target, name=name, daemon=True))
            self._threads[-1].start()

    def stop(self) -> None:
        """End the loops within `_STOP_S`, without waiting for an object store.

        A round that waits longer for a database, a broker or a receiver of webhooks is left alone
        and ends with the process: whatever it leaves undone the next round of any process does.
        """
        self._stop.set()
        self.artifacts.stop()
        deadline = time.monotonic() + _STOP_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def run_once(self, *, collect: bool = True) -> None:
        """One round; `collect` includes the removal of garbage files."""
        self.expire_leases()
        self.expire_deadlines()
        self.resend()
        if collect:
            self.forget_keys()
            self.collect_garbage()

    def expire_leases(self) -> int:
        """Queue jobs of lost workers again, within their number of retries; how many."""
        expired = (jobs.c.state.in_(sorted(ACTIVE)), jobs.c.lease_until < db_now())
        with self.database.read() as conn:
            found = conn.execute(sa.select(jobs.c.id, jobs.c.token, jobs.c.owner).where(*expired))
            lost = found.all()
        count = 0
        for job_id, token, owner in lost:
            with self.database.write() as conn:
                count += requeue(
                    conn,
                    sa.and_(jobs.c.id == job_id, jobs.c.token == token, *expired),
                    counter="lost_count",
                    retries=self.settings.lost_retries,
                    reason=f"worker {owner} was lost",
                    failure=WorkerLost("workers were lost too often while running this job"),
                )
            _log.warning("job %s: lease of worker %s expired", job_id, owner)
        return count

    def expire_deadlines(self) -> int:
        """Fail queued jobs whose deadline has passed; how many."""
        overdue = jobs.c.deadline_at < db_now()
        with self.database.read() as conn:
            query = sa.select(jobs.c.id).where(jobs.c.state == "queued", overdue).limit(_BATCH)
            late = conn.execute(query).scalars().all()
        error = DeadlinePassed("the deadline passed before a worker was free")
        count = 0
        for job_id in late:
            with self.database.write() as conn:
                job = transition(
                    conn,
                    jobs.c.id == job_id,
                    "failed",
                    sources=("queued",),
                    where=[overdue],
                    values=error_columns(error),
                    event={"code": error.code},
                )
                count += job is not None
        return count

    def resend(self) -> int:
        """Announce waiting jobs that no message in the broker announces any more; how many.

        A worker works off all it can run, so one waiting message of a queue is enough.
        """
        due = (
            jobs.c.state == "queued",
            jobs.c.not_before <= db_now(),
            sa.or_(
                jobs.c.sent_at.is_(None),
                jobs.c.sent_at < db_now() - self.settings.resend_s,
                jobs.c.sent_at < jobs.c.not_before,
            ),
        )
        order = (jobs.c.priority.desc(), jobs.c.fair_rank, jobs.c.created_at)
        with self.database.read() as conn:
            query = sa.select(jobs.c.id, jobs.c.queue, jobs.c.sent_at).where(*due)
            waiting = conn.execute(query.order_by(*order).limit(_BATCH)).all()
        announced: dict[str, bool] = {}
        for queue in {row.queue for row in waiting}:
            depth = self.dispatcher.depth(queue)
            if depth is None:
                return 0
            announced[queue] = depth > 0
        sent = []
        for job_id, queue, sent_at in waiting:
            if not (announced[queue] and sent_at is not None):
                if not self.dispatcher.send(job_id, queue):
                    break
                announced[queue] = True
            sent.append(job_id)
        self.store.mark_sent(sent)
        return len(sent)

    def forget_keys(self) -> None:
        """Delete idempotency keys after a day."""
        with self.database.write() as conn:
            old = idempotency.c.created_at < db_now() - IDEMPOTENCY_S
            conn.execute(sa.delete(idempotency).where(old))

    def collect_garbage(self) -> int:
        """Remove files that no job needs; how many folders."""
        prune_broker(self.settings)
        for one in leaving(self.database, self.settings.keep_bytes):
            self.store.discard(one.job.id, one.reason)
        for upload in self.uploads.expire():
            _log.info("upload %s of %s has expired", upload.id, upload.tenant)
            self.artifacts.remove_folder(UPLOADS, upload.id)
        collect_uploads(self.settings, self.uploads)
        if self.settings.embedded:
            collect_hub(self.settings, self.database)
        found = collect_artifacts(self.artifacts, self.database)
        found += collect_stages(self.artifacts, self.database)
        return found + collect_work(self.settings, self.database)

    def _loop(self) -> None:
        collected = -math.inf
        while not self._stop.is_set():
            collect = time.monotonic() - collected >= self.settings.collect_s
            try:
                with self._lock() as held:
                    if held:
                        self.run_once(collect=collect)
                collected = time.monotonic() if collect else collected
            except Exception as error:  # noqa: BLE001  (jobs need this thread to go on)
                if not self._stop.is_set():
                    _log.warning("reconciling failed, will try again: %s", error)
            self._stop.wait(self.settings.reconcile_s)

    def _deliver(self) -> None:
        """A thread of its own, because a slow receiver must not delay the rest."""
        while not self._stop.is_set():
            try:
                self._webhooks.deliver_due()
            except Exception as error:  # noqa: BLE001  (one message must not end all)
                _log.warning("webhooks failed, will try again: %s", error)
            self._stop.wait(self.settings.reconcile_s)

    @contextmanager
    def _lock(self) -> Iterator[bool]:
        """Hold the lock for a round; False where another process has it."""
        if self.database.dialect == "postgresql":
            with self.database.engine.connect() as conn:
                locked = sa.func.pg_try_advisory_xact_lock(_LOCK)
                yield bool(conn.execute(sa.select(locked)).scalar_one())
            return
        self.settings.data.mkdir(parents=True, exist_ok=True)
        with (self.settings.data / "reconcile.lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
