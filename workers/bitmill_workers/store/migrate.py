"""Schema versions: upgrade the database, or refuse one of another version.

The embedded service upgrades when it starts; in production `bitmill db upgrade` is a step of its
own and every other process refuses to start on the wrong version.
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from bitmill_workers.errors import StoreUnavailable
from bitmill_workers.store.db import Database

_LOCK = 0x6269746D  # "bitm": serializes concurrent upgrades on PostgreSQL


def _config(conn: sa.Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    config.attributes["connection"] = conn
    return config


def head_revision() -> str:
    """The schema version that this code needs."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    assert head is not None
    return head


def current_revision(database: Database) -> str | None:
    """The database's schema version; None for an empty database."""
    with database.read() as conn:
        return MigrationContext.configure(conn).get_current_revision()


def upgrade(database: Database, revision: str = "head") -> None:
    """Bring the schema to `revision` in one transaction; safe to call from several processes."""
    with database.write() as conn:
        if database.dialect == "postgresql":
            conn.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
        command.upgrade(_config(conn), revision)


def downgrade(database: Database, revision: str) -> None:
    """Take the schema back to `revision` ("base" empties the database)."""
    with database.write() as conn:
        command.downgrade(_config(conn), revision)


def require_head(database: Database) -> None:
    """Raise `StoreUnavailable` unless the schema is exactly the one this code needs."""
    current, head = current_revision(database), head_revision()
    if current != head:
        raise StoreUnavailable(
            f"the database has schema version {current or 'none'}, this program needs {head}: "
            "run `bitmill db upgrade`",
            code="wrong_schema",
        )
