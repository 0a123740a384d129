"""The worker process: `python -m bitmill_workers.worker`, settings from the environment.

One job at a time: a Celery worker with a prefork pool of one, because only that pool can be
stopped and asked while a task runs. It never imports torch. SIGTERM hands the job back and ends.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import sys
import threading
import time
import warnings
from contextlib import closing
from importlib.metadata import version

import sqlalchemy as sa

from bitmill_workers.execution.device_memory import device_memory
from bitmill_workers.logs import configure_logs, run_logged
from bitmill_workers.messaging.app import create_celery
from bitmill_workers.settings import Settings
from bitmill_workers.storage.garbage import collect_hub, collect_staging, collect_work
from bitmill_workers.storage.open import open_artifacts
from bitmill_workers.storage.uploads import collect_uploads
from bitmill_workers.store.catalog import Catalog
from bitmill_workers.store.db import Database, errors_told
from bitmill_workers.store.migrate import require_head
from bitmill_workers.store.uploads import UploadStore

_BEAT_S = 20.0
_COLLECT_S = 3600.0
_log = logging.getLogger(__name__)


def main() -> int:
    """Serve jobs until told to stop."""
    # Read by Celery when its worker is imported: SIGTERM then stops running tasks as well.
    os.environ["REMAP_SIGTERM"] = "SIGQUIT"
    from celery import signals
    from celery.platforms import SecurityWarning

    from bitmill_workers.messaging import tasks

    warnings.simplefilter("ignore", SecurityWarning)
    settings = Settings()
    configure_logs(settings)
    with errors_told(settings.database), closing(Database(settings.database)) as database:
        require_head(database)
    app = create_celery(settings)
    tasks.register(app, settings)
    stop = threading.Event()

    def on_ready(**_: object) -> None:
        threading.Thread(target=_beat, args=(settings, stop), daemon=True).start()
        app.send_task("bitmill.run", queue=settings.queues[0], retry=False)

    signals.worker_ready.connect(on_ready, weak=False)
    options = ["--pool=prefork", "--concurrency=1"]
    options += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    name = f"--hostname={settings.worker_name}@{socket.gethostname()}"
    queues = f"--queues={','.join(settings.queues)}"
    try:
        app.worker_main(["--quiet", "worker", *options, name, queues, "--loglevel=WARNING"])
    finally:
        stop.set()
        _leave(settings)
    return 0


def _beat(settings: Settings, stop: threading.Event) -> None:
    """Show this worker as live until it stops, and keep its disk clean.

    The connection is not kept, because the pool may fork at any time.
    """
    collected = -math.inf
    while True:
        database = Database(settings.database)
        try:
            if not settings.embedded and time.monotonic() - collected > _COLLECT_S:
                collect_work(settings, database)
                collect_hub(settings, database)
                collect_uploads(settings, UploadStore(database))
                collect_staging(settings, open_artifacts(settings), database)
                collected = time.monotonic()
            memory = device_memory(settings.device)
            Catalog(database).beat(
                settings.worker_name,
                host=socket.gethostname(),
                queues=settings.queues,
                device=settings.device,
                version=version("bitmill"),
                memory=None if memory is None else (memory.free, memory.total),
            )
        except Exception as error:  # noqa: BLE001  (without this thread the worker looks dead)
            _log.warning("cannot show this worker as live: %s", error)
        finally:
            database.close()
        if stop.wait(_BEAT_S):
            return


def _leave(settings: Settings) -> None:
    """Show this worker as gone, if the database is there to be told."""
    database = Database(settings.database)
    try:
        Catalog(database).leave(settings.worker_name)
    except sa.exc.SQLAlchemyError as error:
        _log.warning("cannot show this worker as gone: %s", type(error).__name__)
    finally:
        database.close()


if __name__ == "__main__":
    sys.exit(run_logged(main))
