"""How long a job's files are kept, and which queues and workers take no more jobs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Jobs that are there are kept as before: until they are deleted."""
    op.add_column(
        "jobs", sa.Column("pinned", sa.Boolean, nullable=False, server_default=sa.false())
    )
    op.add_column("jobs", sa.Column("keep_days", sa.Double))
    op.add_column("jobs", sa.Column("discarded_at", sa.Double))
    op.create_table(
        "pauses",
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("by", sa.String(16)),
        sa.PrimaryKeyConstraint("kind", "name", name=op.f("pk_pauses")),
    )


def downgrade() -> None:
    """Drop the table and the columns."""
    op.drop_table("pauses")
    for column in ("discarded_at", "keep_days", "pinned"):
        op.drop_column("jobs", column)
