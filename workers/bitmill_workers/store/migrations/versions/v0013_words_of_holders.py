"""What a tenant says of a profile or a map moves from the shared row to its holding."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"

_JSON = sa.JSON(none_as_null=True)
_TABLES: tuple[tuple[str, str, dict[str, sa.types.TypeEngine[Any]]], ...] = (
    ("map", "bit_width_maps", {"name": sa.String(200)}),
    ("profile", "profiles", {"model": sa.String(4200), "settings": _JSON}),
)
_ALONE = (
    "(SELECT count(*) FROM holdings AS others"
    " WHERE others.kind = holdings.kind AND others.id = holdings.id) = 1"
)


def upgrade() -> None:
    """A sole holder keeps what the row says. Of several it is unknown who said it, and a name that
    one lost is better than one that another reads: their holdings say nothing until the same is
    stored again."""
    op.add_column("holdings", _created_at())
    for kind, table, columns in _TABLES:
        rows = f"FROM {table} WHERE {table}.id = holdings.id"
        op.execute(
            f"UPDATE holdings SET created_at = (SELECT created_at {rows}) WHERE kind = '{kind}'"
            f" AND EXISTS (SELECT 1 {rows})"
        )
        for name, of_type in columns.items():
            op.add_column("holdings", sa.Column(name, of_type))
            op.execute(
                f"UPDATE holdings SET {name} = (SELECT {name} {rows})"
                f" WHERE kind = '{kind}' AND {_ALONE}"
            )
        for name in (*columns, "created_at"):
            op.drop_column(table, name)


def downgrade() -> None:
    """The row says again what a sole holder says; words of several are told to none of them."""
    for kind, table, columns in _TABLES:
        rows = f"FROM holdings WHERE holdings.kind = '{kind}' AND holdings.id = {table}.id"
        defaults = {"model": "", "settings": "{}"}  # name may be NULL
        for name, of_type in columns.items():
            default = defaults.get(name)
            column = sa.Column(name, of_type, nullable=default is None, server_default=default)
            op.add_column(table, column)
            said = f"{rows} AND {_ALONE} AND holdings.{name} IS NOT NULL"
            op.execute(
                f"UPDATE {table} SET {name} = (SELECT holdings.{name} {said})"
                f" WHERE EXISTS (SELECT 1 {said})"
            )
            op.drop_column("holdings", name)
        op.add_column(table, _created_at())
        op.execute(
            f"UPDATE {table} SET created_at = (SELECT min(holdings.created_at) {rows})"
            f" WHERE EXISTS (SELECT 1 {rows})"
        )
    op.drop_column("holdings", "created_at")


def _created_at() -> sa.Column[float]:
    return sa.Column("created_at", sa.Double, nullable=False, server_default="0")
