"""Make a deployment ready, once per version: `python -m bitmill_workers.prepare`.

Brings the database to this version's schema and creates the bucket; repeating it changes nothing.
Where one of them cannot be used, a line of the log says so and the exit code is 1.
"""

from __future__ import annotations

import logging
import sys
from contextlib import closing

from bitmill_workers.logs import configure_logs, run_logged
from bitmill_workers.settings import Settings
from bitmill_workers.storage.open import open_artifacts
from bitmill_workers.store.db import Database, errors_told
from bitmill_workers.store.migrate import current_revision, upgrade

_log = logging.getLogger(__name__)


def main() -> int:
    """Prepare what the settings name."""
    settings = Settings()
    configure_logs(settings)
    with errors_told(settings.database), closing(Database(settings.database)) as database:
        upgrade(database)
        _log.info("database is at schema version %s", current_revision(database))
    open_artifacts(settings).prepare()
    return 0


if __name__ == "__main__":
    sys.exit(run_logged(main))
