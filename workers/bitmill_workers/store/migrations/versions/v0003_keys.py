"""API keys, who made a job, and whose profiles and maps are."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_JSON = sa.JSON(none_as_null=True)
_LOCAL = "local"


def upgrade() -> None:
    """What is there belongs to the tenant that a service without keys acts for."""
    op.add_column("jobs", sa.Column("created_by", sa.String(16)))
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(16), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("scopes", _JSON, nullable=False),
        sa.Column("limits", _JSON, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("created_by", sa.String(16)),
        sa.Column("expires_at", sa.Double),
        sa.Column("last_used", sa.Double),
        sa.Column("revoked_at", sa.Double),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
    )
    op.create_table(
        "holdings",
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("id", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "kind", "id", name=op.f("pk_holdings")),
    )
    op.create_index("ix_holdings_kind_id", "holdings", ["kind", "id"])
    for kind, table in (("profile", "profiles"), ("map", "bit_width_maps")):
        op.execute(
            f"INSERT INTO holdings (tenant, kind, id) SELECT '{_LOCAL}', '{kind}', id FROM {table}"
        )


def downgrade() -> None:
    """Drop both tables and the column."""
    op.drop_table("holdings")
    op.drop_table("api_keys")
    op.drop_column("jobs", "created_by")
