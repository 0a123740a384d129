"""The one Celery task: wake up and work off whatever the database has for this worker."""

from __future__ import annotations

import logging
import os
import signal

from celery import Celery, signals

from bitmill.runtime.lifetime import die_with_parent
from bitmill_workers.execution.stop import StopRequest
from bitmill_workers.execution.supervisor import Supervisor
from bitmill_workers.messaging.app import TASK
from bitmill_workers.settings import Settings
from bitmill_workers.store.db import Database

_log = logging.getLogger(__name__)


def register(app: Celery, settings: Settings) -> None:
    """Register the task on `app` for a worker with these settings."""
    supervisors: dict[int, Supervisor] = {}
    worker = os.getpid()

    def supervisor() -> Supervisor:
        """One per process: database connections must not cross a fork."""
        if os.getpid() not in supervisors:
            supervisors[os.getpid()] = Supervisor(settings, Database(settings.database))
        return supervisors[os.getpid()]

    def run(job_id: object = None) -> None:
        """Run jobs until none is left or the worker stops; the id is only a hint."""
        with StopRequest() as stop:
            while not stop.requested and supervisor().run_next(stop):
                pass
        if stop.requested and os.getppid() != worker:
            os._exit(0)
        if stop.requested:
            raise SystemExit(0)

    app.task(run, name=TASK)
    signals.worker_process_init.connect(_on_process_init, weak=False)


def _on_process_init(**_: object) -> None:
    """A pool process whose worker was killed hands its job back instead of working on alone."""
    die_with_parent(signal.SIGTERM)
