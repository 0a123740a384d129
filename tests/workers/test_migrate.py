"""Schema versions."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from bitmill.errors import ModelError
from bitmill_workers.errors import StoreUnavailable
from bitmill_workers.settings import Settings
from bitmill_workers.store.catalog import Catalog
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


def test_words_of_a_shared_row_stay_with_a_sole_holder_alone(database: Database) -> None:
    catalog = Catalog(database)
    spoken = {"model": "alice/secret", "settings": {"seed": 1}}
    for tenants in (["alice"], ["alice", "bob"]):
        last = tenants[-1]
        for tenant in tenants:
            catalog.add_map({"linears": {last: "3"}}, name="secret", tenant=tenant)
            catalog.add_profile(last, path=last, tenant=tenant, **spoken)
    before = {tenant: catalog.maps(tenant=tenant) for tenant in ("alice", "bob")}
    downgrade(database, "0012")
    for table, name in (("bit_width_maps", "name"), ("profiles", "model")):
        with database.read() as conn:
            rows = conn.execute(sa.text(f"SELECT {name}, created_at FROM {table}")).all()
        assert all(row.created_at > 0 for row in rows)
        assert sorted("secret" in str(row) for row in rows) == [False, True]  # of the sole holder
    # as 0012 stored it: words of the first for all who have the same
    with database.write() as conn:
        conn.execute(sa.text("UPDATE bit_width_maps SET name = 'secret'"))
        conn.execute(sa.text("UPDATE profiles SET model = 'alice/secret'"))
    upgrade(database)
    for tenant, held in before.items():
        for old in held:
            new = catalog.map(old.id, tenant=tenant)
            assert new is not None
            assert new.created_at > 0
            assert new.name == ("secret" if old.map == {"linears": {"alice": "3"}} else None)
    alone, alices, bobs = (
        catalog.profile(profile, tenant=tenant)
        for profile, tenant in (("alice", "alice"), ("bob", "alice"), ("bob", "bob"))
    )
    assert alone is not None
    assert (alone.model, alone.settings) == ("alice/secret", {"seed": 1})
    for unknown in (alices, bobs):
        assert unknown is not None
        assert (unknown.model, unknown.settings) == (None, None)
    catalog.add_profile("bob", model="bob/own", settings={"seed": 2}, path="bob", tenant="bob")
    again = catalog.profile("bob", tenant="bob")
    assert again is not None
    assert (again.model, again.settings) == ("bob/own", {"seed": 2})


def test_wrong_schema_is_refused(settings: Settings) -> None:
    empty = Database(settings.database)
    with pytest.raises(StoreUnavailable, match="bitmill db upgrade"):
        require_head(empty)
    empty.close()


def test_database_refuses_an_unknown_state(database: Database) -> None:
    job = JobStore(database).submit(spec()).job
    with pytest.raises(sa.exc.IntegrityError):
        set_columns(database, job.id, state="lost")
