"""Tables of the job store, the same on SQLite and PostgreSQL.

Times are seconds since the epoch by the database's clock, as doubles; JSON columns hold closed,
versioned documents. Migrations in `migrations/versions` create them; a test compares the two.
"""

from __future__ import annotations

import sqlalchemy as sa

from bitmill_workers.store.states import STATES

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("kind", sa.String(16), nullable=False, server_default="quantize"),
    sa.Column("tenant", sa.String(64), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("stage", sa.String(16)),
    sa.Column("spec", sa.JSON(none_as_null=True), nullable=False),
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
    sa.Column("progress", sa.JSON(none_as_null=True)),
    sa.Column("error_code", sa.String(64)),
    sa.Column("error_message", sa.Text),
    sa.Column("error_param", sa.String(200)),
    sa.Column("error_kind", sa.String(200)),
    sa.Column("error_hint", sa.Text),
    sa.Column("result", sa.JSON(none_as_null=True)),
    sa.Column("profile_id", sa.String(64)),
    sa.Column("parent_id", sa.String(36)),
    sa.Column("webhook_url", sa.String(2048)),
    sa.Column("next_seq", sa.BigInteger, nullable=False),
    sa.Column("log_size", sa.BigInteger, nullable=False),
    sa.Column("schema_version", sa.Integer, nullable=False),
    sa.Column("created_by", sa.String(16)),
    sa.Column("max_running", sa.Integer),
    sa.Column("pinned", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("keep_days", sa.Double),
    sa.Column("discarded_at", sa.Double),
    sa.Column("sweep_id", sa.String(36)),
    sa.Column("cell", sa.Integer),
    sa.CheckConstraint("state IN ({})".format(", ".join(f"'{s}'" for s in STATES)), name="state"),
)

QUEUED: sa.ColumnElement[str] = sa.literal_column("'queued'", sa.String)
"""To compare `jobs.c.state` with: only a literal lets SQLite use an index of queued jobs alone."""
_QUEUED = sa.text("state = 'queued'")
_ACTIVE = sa.text("state IN ('running', 'finalizing')")
sa.Index(
    "ix_jobs_claim",
    jobs.c.priority.desc(),
    jobs.c.fair_rank,
    jobs.c.created_at,
    sqlite_where=_QUEUED,
    postgresql_where=_QUEUED,
)
# The state is the same in all of it: with it SQLite prefers this one to the index of all states,
# from which it would sort every queued job at each submission.
sa.Index(
    "ix_jobs_queue_rank",
    jobs.c.state,
    jobs.c.fair_rank,
    sqlite_where=_QUEUED,
    postgresql_where=_QUEUED,
)
sa.Index("ix_jobs_lease", jobs.c.lease_until, sqlite_where=_ACTIVE, postgresql_where=_ACTIVE)
sa.Index("ix_jobs_tenant_rank", jobs.c.tenant, jobs.c.fair_rank)
sa.Index("ix_jobs_fair_rank", jobs.c.fair_rank)
sa.Index("ix_jobs_parent", jobs.c.parent_id)
sa.Index("ix_jobs_state", jobs.c.state, jobs.c.id)
_OF_A_SWEEP = sa.text("sweep_id IS NOT NULL")
sa.Index(
    "ix_jobs_sweep",
    jobs.c.sweep_id,
    jobs.c.cell,
    sqlite_where=_OF_A_SWEEP,
    postgresql_where=_OF_A_SWEEP,
)

job_events = sa.Table(
    "job_events",
    metadata,
    sa.Column("job_id", sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("time", sa.Double, nullable=False),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("data", sa.JSON(none_as_null=True), nullable=False),
)

job_logs = sa.Table(
    "job_logs",
    metadata,
    sa.Column("job_id", sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("start", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("data", sa.LargeBinary, nullable=False),
)

artifacts = sa.Table(
    "artifacts",
    metadata,
    sa.Column("job_id", sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("path", sa.String(1024), primary_key=True),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("storage_key", sa.String(1200), nullable=False),
)

idempotency = sa.Table(
    "idempotency",
    metadata,
    sa.Column("tenant", sa.String(64), primary_key=True),
    sa.Column("key", sa.String(255), primary_key=True),
    sa.Column("request_hash", sa.String(64), nullable=False),
    sa.Column("job_id", sa.ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
)

sweeps = sa.Table(
    "sweeps",
    metadata,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("tenant", sa.String(64), nullable=False),
    sa.Column("label", sa.String(200)),
    sa.Column("spec", sa.JSON(none_as_null=True), nullable=False),
    sa.Column("idempotency_key", sa.String(255)),
    sa.Column("request_hash", sa.String(64), nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("created_by", sa.String(16)),
)
sa.Index("ix_sweeps_tenant_key", sweeps.c.tenant, sweeps.c.idempotency_key)

sweep_stages = sa.Table(
    "sweep_stages",
    metadata,
    sa.Column("sweep_id", sa.String(36), primary_key=True),
    sa.Column("stage", sa.String(90), primary_key=True),
    sa.Column("job_id", sa.String(36), nullable=False),
    sa.Column("token", sa.BigInteger, nullable=False),
    sa.Column("made", sa.Boolean, nullable=False),
)
"""Who makes a stage that several jobs of a sweep need, or has made it (`store/sweeps.py`)."""

profiles = sa.Table(
    "profiles",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("path", sa.String(1200), nullable=False),
)

bit_width_maps = sa.Table(
    "bit_width_maps",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("map", sa.JSON(none_as_null=True), nullable=False),
)

workers = sa.Table(
    "workers",
    metadata,
    sa.Column("name", sa.String(200), primary_key=True),
    sa.Column("host", sa.String(255), nullable=False),
    sa.Column("queues", sa.JSON(none_as_null=True), nullable=False),
    sa.Column("device", sa.String(64), nullable=False),
    sa.Column("version", sa.String(32), nullable=False),
    sa.Column("started_at", sa.Double, nullable=False),
    sa.Column("last_seen", sa.Double, nullable=False),
    sa.Column("device_free", sa.BigInteger),
    sa.Column("device_total", sa.BigInteger),
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.String(16), primary_key=True),
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("tenant", sa.String(64), nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("scopes", sa.JSON(none_as_null=True), nullable=False),
    sa.Column("limits", sa.JSON(none_as_null=True), nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("created_by", sa.String(16)),
    sa.Column("expires_at", sa.Double),
    sa.Column("last_used", sa.Double),
    sa.Column("revoked_at", sa.Double),
)

holdings = sa.Table(
    "holdings",
    metadata,
    sa.Column("tenant", sa.String(64), primary_key=True),
    sa.Column("kind", sa.String(16), primary_key=True),
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("shape", sa.String(64)),
    sa.Column("weights", sa.String(64)),
    sa.Column("name", sa.String(200)),
    sa.Column("model", sa.String(4200)),
    sa.Column("settings", sa.JSON(none_as_null=True)),
    sa.Column("created_at", sa.Double, nullable=False),
)
"""Whose a profile or a map is, both of which are stored once however many have the same, and all
that one tenant says of it and no other may read. Of a map: its name and the fingerprint of the
model that its holder has it from. Of a profile: model and settings of its holder's job."""
sa.Index("ix_holdings_shape", holdings.c.shape)
sa.Index("ix_holdings_weights", holdings.c.weights)
sa.Index("ix_holdings_kind_id", holdings.c.kind, holdings.c.id)

uploads = sa.Table(
    "uploads",
    metadata,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("tenant", sa.String(64), nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("files", sa.JSON(none_as_null=True), nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("created_by", sa.String(16)),
    sa.Column("expires_at", sa.Double, nullable=False),
)
sa.Index("ix_uploads_tenant_digest", uploads.c.tenant, uploads.c.digest, unique=True)

upload_parts = sa.Table(
    "upload_parts",
    metadata,
    sa.Column("upload_id", sa.ForeignKey("uploads.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("path", sa.String(512), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
)

pauses = sa.Table(
    "pauses",
    metadata,
    sa.Column("kind", sa.String(16), primary_key=True),
    sa.Column("name", sa.String(200), primary_key=True),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("by", sa.String(16)),
)
"""Queues and workers that take no more jobs."""

push_tokens = sa.Table(
    "push_tokens",
    metadata,
    sa.Column("job_id", sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("sealed", sa.LargeBinary, nullable=False),
)
"""Encrypted tokens of pushes that have not ended (`store/tokens.py`)."""

DELIVERY_TRIES = 10
"""How often the message of an outbox row is sent before it is given up."""

outbox = sa.Table(
    "outbox",
    metadata,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("job_id", sa.ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    sa.Column("url", sa.String(2048), nullable=False),
    sa.Column("payload", sa.JSON(none_as_null=True), nullable=False),
    sa.Column("tries", sa.Integer, nullable=False),
    sa.Column("next_try", sa.Double, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("delivered_at", sa.Double),
    sa.Column("last_error", sa.Text),
)
sa.Index("ix_outbox_next_try", outbox.c.next_try)
