"""The fingerprint of the model that a map is of."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    """NULL is unknown."""
    for name in ("shape", "weights"):
        op.add_column("holdings", sa.Column(name, sa.String(64)))
        op.create_index(f"ix_holdings_{name}", "holdings", [name])


def downgrade() -> None:
    """Drop both."""
    for name in ("weights", "shape"):
        op.drop_index(f"ix_holdings_{name}", "holdings")
        op.drop_column("holdings", name)
