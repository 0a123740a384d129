"""Encrypted tokens of pushes, until these have ended."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """A row per push that has not ended."""
    op.create_table(
        "push_tokens",
        sa.Column("job_id", sa.String(36), nullable=False),
        sa.Column("sealed", sa.LargeBinary, nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_push_tokens_job_id_jobs"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_push_tokens")),
    )


def downgrade() -> None:
    """Drop the table."""
    op.drop_table("push_tokens")
