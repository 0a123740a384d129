"""Which job of a sweep makes a stage that its other jobs need too."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    """Jobs that run now have taken none."""
    op.create_table(
        "sweep_stages",
        sa.Column("sweep_id", sa.String(36), nullable=False),
        sa.Column("stage", sa.String(90), nullable=False),
        sa.Column("job_id", sa.String(36), nullable=False),
        sa.Column("token", sa.BigInteger, nullable=False),
        sa.Column("made", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("sweep_id", "stage", name=op.f("pk_sweep_stages")),
    )


def downgrade() -> None:
    """Drop the table."""
    op.drop_table("sweep_stages")
