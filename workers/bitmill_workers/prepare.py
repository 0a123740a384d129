"""Make a deployment ready, once per version: `python -m bitmill_workers.prepare`.

Brings the database to this version's schema and creates the bucket; repeating it changes nothing.
"""

from __future__ import annotations

import logging
import sys

from bitmill_workers.logs import configure_logs
from bitmill_workers.settings import Settings
from bitmill_workers.storage.open import open_artifacts
from bitmill_workers.store.db import Database
from bitmill_workers.store.migrate import current_revision, upgrade

_log = logging.getLogger(__name__)


def main() -> int:
    """Prepare what the settings name."""
    settings = Settings()
    configure_logs(settings)
    database = Database(settings.database)
    upgrade(database)
    _log.info("database is at schema version %s", current_revision(database))
    database.close()
    open_artifacts(settings).prepare()
    return 0


if __name__ == "__main__":
    sys.exit(main())
