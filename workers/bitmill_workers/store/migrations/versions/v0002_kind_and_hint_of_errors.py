"""The class of a job's error and its hint, beside code, message and parameter."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Earlier rows keep NULL in both."""
    op.add_column("jobs", sa.Column("error_kind", sa.String(200)))
    op.add_column("jobs", sa.Column("error_hint", sa.Text))


def downgrade() -> None:
    """Drop both."""
    op.drop_column("jobs", "error_hint")
    op.drop_column("jobs", "error_kind")
