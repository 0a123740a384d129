"""What a job does, and the jobs that were made from it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Jobs that are there quantize."""
    kind = sa.Column("kind", sa.String(16), nullable=False, server_default="quantize")
    op.add_column("jobs", kind)
    op.create_index("ix_jobs_parent", "jobs", ["parent_id"])


def downgrade() -> None:
    """Drop both; jobs of other kinds cannot be read any more, so they go too."""
    op.execute("DELETE FROM jobs WHERE kind <> 'quantize'")
    op.drop_index("ix_jobs_parent", "jobs")
    op.drop_column("jobs", "kind")
