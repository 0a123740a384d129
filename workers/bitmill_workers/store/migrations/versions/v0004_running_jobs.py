"""How many jobs of its tenant may run beside a job."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """NULL is without a limit."""
    op.add_column("jobs", sa.Column("max_running", sa.Integer))


def downgrade() -> None:
    """Drop the column."""
    op.drop_column("jobs", "max_running")
