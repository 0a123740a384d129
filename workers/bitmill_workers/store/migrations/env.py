"""Alembic's environment: always runs on the connection that `store/migrate.py` opened."""

from __future__ import annotations

from alembic import context

from bitmill_workers.store.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
    transaction_per_migration=False,
)
with context.begin_transaction():
    context.run_migrations()
