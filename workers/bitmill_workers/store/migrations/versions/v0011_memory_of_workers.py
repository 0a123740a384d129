"""Memory of the devices of workers, and the state in the index of queued jobs by rank."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"

_QUEUED = sa.text("state = 'queued'")


def upgrade() -> None:
    """NULL where a worker has no device, or cannot ask."""
    for name in ("device_free", "device_total"):
        op.add_column("workers", sa.Column(name, sa.BigInteger))
    _index(["state", "fair_rank"])


def downgrade() -> None:
    """Drop both columns; the index is of the rank alone again."""
    _index(["fair_rank"])
    for name in ("device_total", "device_free"):
        op.drop_column("workers", name)


def _index(columns: Sequence[str]) -> None:
    op.drop_index("ix_jobs_queue_rank", "jobs")
    op.create_index(
        "ix_jobs_queue_rank",
        "jobs",
        columns,
        sqlite_where=_QUEUED,
        postgresql_where=_QUEUED,
    )
