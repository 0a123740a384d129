"""First tables: jobs, their events, logs and artifacts, profiles, maps, workers, outbox."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_JSON = sa.JSON(none_as_null=True)


def _jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("stage", sa.String(16)),
        sa.Column("spec", _JSON, nullable=False),
        sa.Column("model", sa.String(4200), nullable=False),
        sa.Column("label", sa.String(200)),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("fair_rank", sa.BigInteger, nullable=False),
        sa.Column("queue", sa.String(16), nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("lost_count", sa.Integer, nullable=False),
        sa.Column("crash_count", sa.Integer, nullable=False),
        sa.Column("oom_count", sa.Integer, nullable=False),
        sa.Column("handback_count", sa.Integer, nullable=False),
        sa.Column("token", sa.BigInteger, nullable=False),
        sa.Column("owner", sa.String(200)),
        sa.Column("lease_until", sa.Double),
        sa.Column("not_before", sa.Double, nullable=False),
        sa.Column("deadline_at", sa.Double),
        sa.Column("cancel_requested_at", sa.Double),
        sa.Column("sent_at", sa.Double),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("queued_at", sa.Double, nullable=False),
        sa.Column("started_at", sa.Double),
        sa.Column("finalizing_at", sa.Double),
        sa.Column("finished_at", sa.Double),
        sa.Column("estimated_finish", sa.Double),
        sa.Column("progress", _JSON),
        sa.Column("error_code", sa.String(64)),
        sa.Column("error_message", sa.Text),
        sa.Column("error_param", sa.String(200)),
        sa.Column("result", _JSON),
        sa.Column("profile_id", sa.String(64)),
        sa.Column("parent_id", sa.String(36)),
        sa.Column("webhook_url", sa.String(2048)),
        sa.Column("next_seq", sa.BigInteger, nullable=False),
        sa.Column("log_size", sa.BigInteger, nullable=False),
        sa.Column("schema_version", sa.Integer, nullable=False),
        sa.CheckConstraint(
            "state IN ('queued', 'running', 'finalizing', 'succeeded', 'failed', 'cancelled')",
            name=op.f("ck_jobs_state"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
    )
    queued = sa.text("state = 'queued'")
    active = sa.text("state IN ('running', 'finalizing')")
    op.create_index(
        "ix_jobs_claim",
        "jobs",
        [sa.text("priority DESC"), "fair_rank", "created_at"],
        sqlite_where=queued,
        postgresql_where=queued,
    )
    op.create_index(
        "ix_jobs_queue_rank", "jobs", ["fair_rank"], sqlite_where=queued, postgresql_where=queued
    )
    op.create_index(
        "ix_jobs_lease", "jobs", ["lease_until"], sqlite_where=active, postgresql_where=active
    )
    op.create_index("ix_jobs_tenant_rank", "jobs", ["tenant", "fair_rank"])
    op.create_index("ix_jobs_fair_rank", "jobs", ["fair_rank"])
    op.create_index("ix_jobs_state", "jobs", ["state", "id"])


def _job_column(table: str) -> tuple[sa.Column[str], sa.ForeignKeyConstraint]:
    """The `job_id` of a table whose rows vanish with their job."""
    return (
        sa.Column("job_id", sa.String(36), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f(f"fk_{table}_job_id_jobs"), ondelete="CASCADE"
        ),
    )


def _parts_of_jobs() -> None:
    op.create_table(
        "job_events",
        *_job_column("job_events"),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("time", sa.Double, nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("data", _JSON, nullable=False),
        sa.PrimaryKeyConstraint("job_id", "seq", name=op.f("pk_job_events")),
    )
    op.create_table(
        "job_logs",
        *_job_column("job_logs"),
        sa.Column("start", sa.BigInteger, nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("job_id", "start", name=op.f("pk_job_logs")),
    )
    op.create_table(
        "artifacts",
        *_job_column("artifacts"),
        sa.Column("path", sa.String(1024), nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("storage_key", sa.String(1200), nullable=False),
        sa.PrimaryKeyConstraint("job_id", "path", name=op.f("pk_artifacts")),
    )
    op.create_table(
        "idempotency",
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("key", sa.String(255), nullable=False),
        sa.Column("request_hash", sa.String(64), nullable=False),
        *_job_column("idempotency"),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("tenant", "key", name=op.f("pk_idempotency")),
    )
    op.create_table(
        "outbox",
        sa.Column("id", sa.String(36), nullable=False),
        *_job_column("outbox"),
        sa.Column("url", sa.String(2048), nullable=False),
        sa.Column("payload", _JSON, nullable=False),
        sa.Column("tries", sa.Integer, nullable=False),
        sa.Column("next_try", sa.Double, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("delivered_at", sa.Double),
        sa.Column("last_error", sa.Text),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_outbox")),
    )
    op.create_index("ix_outbox_next_try", "outbox", ["next_try"])


def _catalog() -> None:
    op.create_table(
        "profiles",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("model", sa.String(4200), nullable=False),
        sa.Column("settings", _JSON, nullable=False),
        sa.Column("path", sa.String(1200), nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_profiles")),
    )
    op.create_table(
        "bit_width_maps",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("name", sa.String(200)),
        sa.Column("map", _JSON, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_bit_width_maps")),
    )
    op.create_table(
        "workers",
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("host", sa.String(255), nullable=False),
        sa.Column("queues", _JSON, nullable=False),
        sa.Column("device", sa.String(64), nullable=False),
        sa.Column("version", sa.String(32), nullable=False),
        sa.Column("started_at", sa.Double, nullable=False),
        sa.Column("last_seen", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_workers")),
    )


def upgrade() -> None:
    """Create everything."""
    _jobs()
    _parts_of_jobs()
    _catalog()


def downgrade() -> None:
    """Drop everything."""
    for table in (
        "workers",
        "bit_width_maps",
        "profiles",
        "outbox",
        "idempotency",
        "artifacts",
        "job_logs",
        "job_events",
        "jobs",
    ):
        op.drop_table(table)
