"""The Celery app, and who sends wake-ups through it.

A message holds a job id and nothing else, and it is only a hint: the worker that gets it claims
whatever the database says comes first. It is acknowledged early; a lost message is sent again by
the reconciler, a repeated one finds nothing to claim.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

from celery import Celery
from kombu import Exchange, Queue

from bitmill_workers.settings import TIERS, Settings

TASK = "bitmill.run"
_MAX_WAITING = 1000
_STOP_S = 3.0
_EXCHANGE = Exchange("bitmill", type="direct")
_log = logging.getLogger(__name__)


def create_celery(settings: Settings) -> Celery:
    """A Celery app for this broker; no task is registered on it."""
    app = Celery("bitmill", broker=settings.broker, set_as_current=False)
    app.conf.update(
        task_serializer="json",
        accept_content=["json"],
        result_backend=None,
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        task_acks_late=False,
        task_reject_on_worker_lost=False,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=settings.broker.startswith("redis"),
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        task_publish_retry=False,
        worker_soft_shutdown_timeout=0.0,
        worker_enable_soft_shutdown_on_idle=False,
        worker_max_tasks_per_child=50,
        task_queues=[Queue(name, _EXCHANGE, routing_key=name) for name in TIERS],
        task_create_missing_queues=False,
        task_default_queue="cpu",
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        worker_enable_remote_control=False,
        enable_utc=True,
        broker_transport_options=_transport_options(settings),
    )
    return app


def _transport_options(settings: Settings) -> dict[str, Any]:
    if not settings.embedded:
        return {
            "visibility_timeout": 300,
            "socket_timeout": 20,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "health_check_interval": 25,
            "global_keyprefix": "bitmill:",
            "unacked_restore_interval": 10,
            "unacked_restore_throttle": 1,
        }
    broker = settings.data.resolve() / "broker"
    folders = {name: broker / name for name in ("queue", "processed", "control")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return {
        "data_folder_in": str(folders["queue"]),
        "data_folder_out": str(folders["queue"]),
        "processed_folder": str(folders["processed"]),
        "control_folder": str(folders["control"]),
        "store_processed": True,
        "polling_interval": 0.2,
    }


class Dispatcher:
    """Sends wake-ups without ever making its caller wait for the broker.

    `on_sent` is told the ids whose message the broker has taken.
    """

    def __init__(self, settings: Settings, on_sent: Callable[[list[str]], None]) -> None:
        self._celery = create_celery(settings)
        self._on_sent = on_sent
        self._waiting: queue.Queue[tuple[str, str] | None] = queue.Queue(_MAX_WAITING)
        self._thread = threading.Thread(target=self._run, name="dispatcher", daemon=True)
        self._thread.start()

    def notify(self, job_id: str, queue_name: str) -> None:
        """Send a wake-up soon; where that fails the reconciler will."""
        try:
            self._waiting.put_nowait((job_id, queue_name))
        except queue.Full:
            _log.warning("broker is slow: the reconciler will send job %s", job_id)

    def send(self, job_id: str, queue_name: str) -> bool:
        """Send a wake-up now; False where the broker did not take it."""
        try:
            self._celery.send_task(TASK, args=[job_id], queue=queue_name, retry=False)
        except Exception as error:  # noqa: BLE001  (transports raise errors of many libraries)
            _log.warning("broker did not take job %s: %s", job_id, type(error).__name__)
            return False
        return True

    def depth(self, queue_name: str) -> int | None:
        """Messages that wait in a queue; None where the broker is away."""
        try:
            with self._celery.connection_for_write() as connection:
                return int(connection.channel()._size(queue_name))
        except Exception as error:  # noqa: BLE001  (transports raise errors of many libraries)
            _log.warning("broker is away: %s", type(error).__name__)
            return None

    def close(self) -> None:
        """Send what is waiting, if the broker takes it, and stop."""
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=1)
        self._thread.join(timeout=_STOP_S)
        self._celery.close()

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            if not self.send(*item):
                self._leave_the_rest()
                continue
            try:
                self._on_sent([item[0]])
            except Exception as error:  # noqa: BLE001  (the thread must outlive the database)
                _log.warning("cannot note that %s was sent: %s", item[0], error)

    def _leave_the_rest(self) -> None:
        """The broker is away: what waits is left to the reconciler, but not the order to stop."""
        with contextlib.suppress(queue.Empty):
            while True:
                if self._waiting.get_nowait() is None:
                    self._waiting.put(None)
                    return
