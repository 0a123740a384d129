"""Schema versions."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from bitmill.errors import ModelError
from bitmill_workers.errors import StoreUnavailable
from bitmill_workers.settings import Settings
from bitmill_workers.store.db import Database
from bitmill_workers.store.jobs import JobStore
from bitmill_workers.store.leases import LeaseStore
from bitmill_workers.store.migrate import (
    current_revision,
    downgrade,
    head_revision,
    require_head,
    upgrade,
)
from bitmill_workers.store.tables import metadata
from stores import QUEUES, set_columns, spec

pytestmark = pytest.mark.parametrize("dialect", ["sqlite", "postgresql"])


def test_migrations_build_exactly_the_tables_of_the_code(database: Database) -> None:
    with database.read() as conn:
        assert compare_metadata(MigrationContext.configure(conn), metadata) == []


def test_upgrade_is_repeatable_and_downgrade_empties(database: Database) -> None:
    upgrade(database)
    assert current_revision(database) == head_revision()
    downgrade(database, "base")
    assert set(sa.inspect(database.engine).get_table_names()) <= {"alembic_version"}
    upgrade(database)
    require_head(database)


def test_failed_job_of_the_first_version_is_still_read(database: Database) -> None:
    store, leases = JobStore(database), LeaseStore(database, lease_s=60)
    job = store.submit(spec()).job
    claimed = leases.claim_next("w", QUEUES)
    assert claimed is not None
    assert leases.fail(job.id, claimed.token, ModelError("it is broken", param="model"))
    downgrade(database, "0001")
    upgrade(database)
    failed = store.get(job.id)
    assert (failed.error_kind, failed.error_hint) == (None, None)
    assert failed.error is not None
    assert failed.error.to_dict() == {
        "kind": "BitmillError",
        "code": "invalid_model",
        "message": "it is broken",
        "param": "model",
        "hint": None,
    }


def test_wrong_schema_is_refused(settings: Settings) -> None:
    empty = Database(settings.database)
    with pytest.raises(StoreUnavailable, match="bitmill db upgrade"):
        require_head(empty)
    empty.close()


def test_database_refuses_an_unknown_state(database: Database) -> None:
    job = JobStore(database).submit(spec()).job
    with pytest.raises(sa.exc.IntegrityError):
        set_columns(database, job.id, state="lost")
