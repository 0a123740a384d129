"""Sweeps, and of which cell of one a job is."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

_OF_A_SWEEP = sa.text("sweep_id IS NOT NULL")


def upgrade() -> None:
    """Jobs that are there are of no sweep."""
    op.create_table(
        "sweeps",
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("label", sa.String(200)),
        sa.Column("spec", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("idempotency_key", sa.String(255)),
        sa.Column("request_hash", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("created_by", sa.String(16)),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_sweeps")),
    )
    op.create_index("ix_sweeps_tenant_key", "sweeps", ["tenant", "idempotency_key"])
    op.add_column("jobs", sa.Column("sweep_id", sa.String(36)))
    op.add_column("jobs", sa.Column("cell", sa.Integer))
    op.create_index(
        "ix_jobs_sweep",
        "jobs",
        ["sweep_id", "cell"],
        sqlite_where=_OF_A_SWEEP,
        postgresql_where=_OF_A_SWEEP,
    )


def downgrade() -> None:
    """Drop the index, the columns and the table."""
    op.drop_index("ix_jobs_sweep", "jobs")
    for column in ("cell", "sweep_id"):
        op.drop_column("jobs", column)
    op.drop_table("sweeps")
