"""Job store as clients see it: submit, look up, cancel, retry, delete, events and logs.

The row is the truth; a broker message is only a wake-up. What workers do with a job (claim, renew,
finish) is in `leases`, profiles and maps are in `catalog`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from bitmill_workers.errors import (
    IdempotencyMismatch,
    JobNotFound,
    QuotaExceeded,
    StateConflict,
)
from bitmill_workers.job_spec import AnySpec, JobKind, ModelRef
from bitmill_workers.settings import TIERS
from bitmill_workers.store.db import Database, db_now, larger
from bitmill_workers.store.needs import hold, refuse_needed, users
from bitmill_workers.store.queues import Queues, read_queues
from bitmill_workers.store.records import (
    Artifact,
    Delivery,
    Event,
    JobRecord,
    LogPage,
    Page,
    Quota,
    Submission,
    job_record,
    new_id,
)
from bitmill_workers.store.states import ACTIVE, TERMINAL, ShownState, State
from bitmill_workers.store.tables import (
    QUEUED,
    artifacts,
    idempotency,
    job_events,
    job_logs,
    jobs,
    outbox,
    push_tokens,
    uploads,
)
from bitmill_workers.store.transitions import add_events, insert_event, transition

MAX_PAGE = 200
IDEMPOTENCY_S = 24 * 3600.0
_QUEUED: tuple[State, ...] = ("queued",)
_BY_ID = sa.select(jobs).where(jobs.c.id == sa.bindparam("wanted"))
_LOCKED = _BY_ID.with_for_update()
_COUNT_QUEUED = sa.select(sa.func.count()).where(jobs.c.state == QUEUED)
_COUNT_OWN = _COUNT_QUEUED.where(jobs.c.tenant == sa.bindparam("tenant"))
_DELIVERY = sa.select(
    outbox.c.tries, outbox.c.next_try, outbox.c.delivered_at, outbox.c.last_error
).where(outbox.c.job_id == sa.bindparam("wanted"))


@dataclass(frozen=True, slots=True)
class Seen:
    """A job, how far its webhook is (None: it has none), and what keeps it from running."""

    job: JobRecord
    delivery: Delivery | None
    queues: Queues


class _KeyTaken(Exception):
    """Another request took the idempotency key first; the transaction is rolled back."""


def model_name(model: ModelRef) -> str:
    """One string that names a model reference: what lists show and filter by."""
    match model.source:
        case "hub":
            name = (
                model.repo_id if model.revision == "main" else f"{model.repo_id}@{model.revision}"
            )
        case "path":
            name = model.path
        case "upload":
            name = model.upload_id
    return name if model.file is None else f"{name}/{model.file}"


class JobStore:
    """Jobs in a database; every method is one transaction."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def submit(
        self,
        spec: AnySpec,
        *,
        tenant: str = "local",
        idempotency_key: str | None = None,
        request_hash: str = "",
        queue: str = "cpu",
        priority: int = 0,
        parent_id: str | None = None,
        webhook_url: str | None = None,
        created_by: str | None = None,
        quota: Quota | None = None,
        keep_days: float | None = None,
        cell: tuple[str, int] | None = None,
        sealed: Callable[[str], bytes] | None = None,
    ) -> Submission:
        """Store a new queued job, or return the one that the same key made within a day.

        `request_hash` identifies the request's body; `created_by` is an API key's id; `cell` is a
        sweep's id and the number of the cell that the job takes the place of; `sealed` gives the
        encrypted token of a push with this id. Raises
        `IdempotencyMismatch` where the key was used with another hash, `QuotaExceeded` where
        the tenant has used up its `quota`, and `InputError` where what the job names is gone.
        """
        values = new_job(
            spec,
            tenant=tenant,
            queue=queue,
            priority=priority,
            parent_id=parent_id,
            webhook_url=webhook_url,
            created_by=created_by,
            max_running=quota and quota.running,
            keep_days=keep_days,
            cell=cell,
        )
        if idempotency_key is None:
            with self.database.write() as conn:
                self.check_quota(conn, tenant, quota)
                return Submission(_insert_sealed(conn, values, sealed), replayed=False)
        return self._submit_once(values, idempotency_key, request_hash, quota, sealed)

    def submitted(
        self, idempotency_key: str, request_hash: str, *, tenant: str = "local"
    ) -> JobRecord | None:
        """The job that this key made within a day, or None; raises as `submit` does."""
        with self.database.read() as conn:
            return self._known_key(conn, tenant, idempotency_key, request_hash)

    def check_quota(
        self, conn: sa.Connection, tenant: str, quota: Quota | None, *, more: int = 1
    ) -> None:
        """Raise `QuotaExceeded` where `more` jobs are too many.

        Submissions of a tenant wait here for each other.
        """
        if quota is None:
            return
        self.wait_for_tenant(conn, tenant)
        if quota.queued is not None:
            count = conn.execute(_COUNT_OWN, {"tenant": tenant}).scalar_one()
            if count + more > quota.queued:
                also = f", {more} more are asked for" if more > 1 else ""
                raise QuotaExceeded(
                    f"{count} jobs of {tenant} are waiting{also}, at most {quota.queued} may"
                )
        if quota.bytes is not None and (held := kept_bytes(conn, tenant)) >= quota.bytes:
            raise QuotaExceeded(
                f"{tenant} keeps {held:,} bytes, at most {quota.bytes:,} may be kept",
                code="quota_bytes",
            )

    def wait_for_tenant(self, conn: sa.Connection, tenant: str) -> None:
        """Let transactions that count what this tenant has follow one another."""
        if self.database.dialect == "postgresql":
            lock = sa.func.pg_advisory_xact_lock(sa.func.hashtext(f"bitmill {tenant}"))
            conn.execute(sa.select(lock))

    def kept_bytes(self, tenant: str) -> int:
        """Bytes of all files that are kept for a tenant."""
        with self.database.read() as conn:
            return kept_bytes(conn, tenant)

    def _submit_once(
        self,
        values: dict[str, Any],
        key: str,
        request_hash: str,
        quota: Quota | None,
        sealed: Callable[[str], bytes] | None,
    ) -> Submission:
        tenant = values["tenant"]
        try:
            with self.database.write() as conn:
                known = self._known_key(conn, tenant, key, request_hash)
                if known is not None:
                    return Submission(known, replayed=True)
                self.check_quota(conn, tenant, quota)
                job = _insert_sealed(conn, values, sealed)
                self._take_key(conn, tenant, key, request_hash, job.id)
                return Submission(job, replayed=False)
        except _KeyTaken:
            known = self.submitted(key, request_hash, tenant=tenant)
        if known is None:
            raise StateConflict(
                f"the job of idempotency key {key!r} was just deleted: use a new key",
                code="idempotency_deleted",
            )
        return Submission(known, replayed=True)

    @staticmethod
    def _known_key(
        conn: sa.Connection, tenant: str, key: str, request_hash: str
    ) -> JobRecord | None:
        mine = (
            idempotency.c.tenant == tenant,
            idempotency.c.key == key,
            idempotency.c.created_at > db_now() - IDEMPOTENCY_S,
        )
        row = conn.execute(sa.select(idempotency).where(*mine)).one_or_none()
        if row is None:
            return None
        check_same_request(key, row.request_hash, request_hash)
        return job_record(conn.execute(sa.select(jobs).where(jobs.c.id == row.job_id)).one())

    def _take_key(
        self, conn: sa.Connection, tenant: str, key: str, request_hash: str, job_id: str
    ) -> None:
        """Bind the key to the job; waits for a concurrent request with the same key."""
        statement = self.database.insert(idempotency).values(
            tenant=tenant, key=key, request_hash=request_hash, job_id=job_id, created_at=db_now()
        )
        renewed = statement.on_conflict_do_update(
            index_elements=[idempotency.c.tenant, idempotency.c.key],
            set_={
                "request_hash": statement.excluded.request_hash,
                "job_id": statement.excluded.job_id,
                "created_at": statement.excluded.created_at,
            },
            where=idempotency.c.created_at <= db_now() - IDEMPOTENCY_S,
        )
        taken = conn.execute(renewed.returning(idempotency.c.job_id))
        if taken.one_or_none() is None:
            raise _KeyTaken

    def get(self, job_id: str, *, tenant: str | None = None) -> JobRecord:
        """One job; raises `JobNotFound`, also where it belongs to another tenant."""
        with self.database.read() as conn:
            return _get(conn, job_id, tenant)

    def seen(self, job_id: str, *, tenant: str | None = None) -> Seen:
        """One job with all that is shown of it, at one moment; raises as `get` does."""
        with self.database.read() as conn:
            return _seen(conn, _get(conn, job_id, tenant))

    def seen_of(self, job: JobRecord) -> Seen:
        """A job that was read before, with what is shown beside it."""
        with self.database.read() as conn:
            return _seen(conn, job)

    def list(
        self,
        *,
        tenant: str | None = None,
        state: ShownState | None = None,
        model: str | None = None,
        label: str | None = None,
        profile: str | None = None,
        kind: JobKind | None = None,
        parent_id: str | None = None,
        limit: int = 50,
        after: str | None = None,
    ) -> Page:
        """Jobs, newest first, that match all given filters; `after` is a former page's.

        model, label: any part of it, in upper or lower case; the others as they are.
        """
        limit = max(1, min(limit, MAX_PAGE))
        query = sa.select(jobs).order_by(jobs.c.id.desc()).limit(limit + 1)
        given = {
            jobs.c.tenant: tenant,
            jobs.c.profile_id: profile,
            jobs.c.kind: kind,
            jobs.c.parent_id: parent_id,
        }
        query = query.where(*(column == value for column, value in given.items() if value))
        parts = {jobs.c.model: model, jobs.c.label: label}
        query = query.where(
            *(column.icontains(part, autoescape=True) for column, part in parts.items() if part)
        )
        if state is not None:
            query = query.where(_shown_as(state))
        if after is not None:
            query = query.where(jobs.c.id < after)
        with self.database.read() as conn:
            found = [job_record(row) for row in conn.execute(query)]
        more = len(found) > limit
        return Page(tuple(found[:limit]), found[limit - 1].id if more else None)

    def request_cancel(
        self, job_id: str, *, tenant: str | None = None, by: str | None = None
    ) -> JobRecord:
        """Cancel a queued job now, or ask the runner of an active one to stop.

        Repeating it changes nothing. `by` is the id of the API key that asks. Raises `JobNotFound`,
        and `StateConflict` (code `job_finished`) where the job has succeeded or failed.
        """
        with self.database.write() as conn:
            job = _get(conn, job_id, tenant)
            mine = jobs.c.id == job_id
            told = {"by": by} if by else {}
            done = transition(conn, mine, "cancelled", sources=_QUEUED, event=told)
            if done is not None:
                return done
            asked = (mine, jobs.c.state.in_(sorted(ACTIVE)), jobs.c.cancel_requested_at.is_(None))
            now = {"cancel_requested_at": db_now()}
            if not add_events(conn, sa.and_(*asked), [("cancel_requested", told)], values=now):
                job = _get(conn, job_id, tenant)
                if job.state in ("succeeded", "failed"):
                    raise StateConflict(
                        f"job {job_id} has already {job.state} and cannot be cancelled",
                        code="job_finished",
                    )
            return _get(conn, job_id, tenant)

    def delete(self, job_id: str, *, tenant: str | None = None) -> None:
        """Remove a finished job with its events, log and artifact rows.

        Its files become garbage, which the reconciler removes. Raises `JobNotFound`, and
        `StateConflict`: code `job_not_finished` for a job that is queued or active, `job_in_use`
        where an unfinished job needs its files.
        """
        with self.database.write() as conn:
            job = _get(conn, job_id, tenant, lock=True)
            if not job.finished:
                raise StateConflict(
                    f"job {job_id} is {job.shown_state}: cancel it before deleting it",
                    code="job_not_finished",
                )
            refuse_needed(conn, "job", [job_id], tenant)
            conn.execute(sa.delete(jobs).where(jobs.c.id == job_id))

    def pin(
        self, job_id: str, pinned: bool, *, tenant: str | None = None, by: str | None = None
    ) -> JobRecord:
        """Keep a job's files whatever their age, or no longer; raises `JobNotFound`."""
        with self.database.write() as conn:
            job = _get(conn, job_id, tenant)
            if job.pinned != pinned:
                told = {"by": by} if by else {}
                kind = "pinned" if pinned else "unpinned"
                add_events(conn, jobs.c.id == job_id, [(kind, told)], values={"pinned": pinned})
            return _get(conn, job_id, tenant)

    def discard(self, job_id: str, reason: str) -> int:
        """Forget a finished job's files, which become garbage, and say why; their bytes.

        0, and nothing is forgotten, where an unfinished job needs them.
        """
        mine = artifacts.c.job_id == job_id
        with self.database.write() as conn:
            conn.execute(_LOCKED, {"wanted": job_id})
            if job_id in users(conn, "job"):
                return 0
            size = sa.select(sa.func.coalesce(sa.func.sum(artifacts.c.size), 0)).where(mine)
            freed = int(conn.execute(size).scalar_one())
            which = (jobs.c.id == job_id, jobs.c.state.in_(sorted(TERMINAL)))
            event = ("discarded", {"reason": reason, "bytes": freed})
            now = {"discarded_at": db_now()}
            if not add_events(conn, sa.and_(*which), [event], values=now):
                return 0
            conn.execute(sa.delete(artifacts).where(mine))
            return freed

    def events(
        self,
        job_id: str,
        *,
        after: int = 0,
        limit: int = 500,
        kinds: Collection[str] | None = None,
    ) -> tuple[Event, ...]:
        """Events with a number above `after`, ascending; `kinds`: only those."""
        query = (
            sa.select(job_events)
            .where(job_events.c.job_id == job_id, job_events.c.seq > after)
            .order_by(job_events.c.seq)
            .limit(limit)
        )
        if kinds is not None:
            query = query.where(job_events.c.kind.in_(sorted(kinds)))
        with self.database.read() as conn:
            rows = conn.execute(query).all()
        return tuple(Event(r.seq, r.time, r.kind, r.data) for r in rows)

    def last_event(self, job_id: str) -> tuple[int, bool]:
        """Number of the job's last event, and whether none will follow; raises `JobNotFound`."""
        query = sa.select(jobs.c.next_seq, jobs.c.state).where(jobs.c.id == job_id)
        with self.database.read() as conn:
            row = conn.execute(query).one_or_none()
        if row is None:
            raise JobNotFound(job_id)
        return row.next_seq - 1, row.state in TERMINAL

    def read_log(self, job_id: str, *, offset: int = 0, limit: int = 1 << 20) -> LogPage:
        """At most `limit` bytes of the job's log from byte `offset`; raises `JobNotFound`."""
        chunks = (
            sa.select(job_logs)
            .where(
                job_logs.c.job_id == job_id,
                job_logs.c.start + sa.func.length(job_logs.c.data) > offset,
                job_logs.c.start < offset + limit,
            )
            .order_by(job_logs.c.start)
        )
        with self.database.read() as conn:
            size = _get(conn, job_id, None).log_size
            rows = conn.execute(chunks).all()
        first = rows[0].start if rows else offset
        data = b"".join(r.data for r in rows)[max(0, offset - first) :][:limit]
        return LogPage(data, offset, offset + len(data), size)

    def artifacts(self, job_id: str) -> tuple[Artifact, ...]:
        """Published files of a job, by path; empty before it has succeeded."""
        query = sa.select(artifacts).where(artifacts.c.job_id == job_id).order_by(artifacts.c.path)
        with self.database.read() as conn:
            rows = conn.execute(query).all()
        return tuple(Artifact(r.path, r.size, r.sha256, r.storage_key) for r in rows)

    def artifact(self, job_id: str, path: str, *, tenant: str | None = None) -> Artifact | None:
        """One published file, or None: the only way from a client's path to a file.

        None also where the job belongs to another tenant.
        """
        query = sa.select(artifacts).where(artifacts.c.job_id == job_id, artifacts.c.path == path)
        if tenant is not None:
            query = query.join(jobs).where(jobs.c.tenant == tenant)
        with self.database.read() as conn:
            row = conn.execute(query).one_or_none()
        return None if row is None else Artifact(row.path, row.size, row.sha256, row.storage_key)

    def counts(self, *, tenant: str | None = None) -> dict[State, int]:
        """Number of jobs in each state that has any."""
        query = sa.select(jobs.c.state, sa.func.count()).group_by(jobs.c.state)
        if tenant is not None:
            query = query.where(jobs.c.tenant == tenant)
        with self.database.read() as conn:
            return {state: count for state, count in conn.execute(query)}

    def load(self) -> dict[str, dict[str, int]]:
        """By queue that has any: how many jobs are `queued`, and how many are `running` now."""
        at_work = sa.case((jobs.c.state == "queued", "queued"), else_="running").label("what")
        query = (
            sa.select(jobs.c.queue, at_work, sa.func.count())
            .where(jobs.c.state.in_(["queued", *sorted(ACTIVE)]))
            .group_by(jobs.c.queue, at_work)
        )
        found: dict[str, dict[str, int]] = {}
        with self.database.read() as conn:
            for queue, what, count in conn.execute(query):
                found.setdefault(queue, {})[what] = count
        return found

    def queues(self, of: Sequence[JobRecord]) -> Queues:
        """What keeps those of these jobs that are queued from running."""
        with self.database.read() as conn:
            return read_queues(conn, of)

    def waiting(self) -> int:
        """Number of queued jobs."""
        with self.database.read() as conn:
            return int(conn.execute(_COUNT_QUEUED).scalar_one())

    def mark_sent(self, job_ids: Sequence[str]) -> None:
        """Note that wake-up messages of these queued jobs have been handed to the broker."""
        if not job_ids:
            return
        with self.database.write() as conn:
            conn.execute(
                sa.update(jobs)
                .where(jobs.c.id.in_(job_ids), jobs.c.state == QUEUED)
                .values(sent_at=db_now())
            )


def kept_bytes(conn: sa.Connection, tenant: str) -> int:
    """Bytes of all files that are kept for a tenant, uploads under way at their whole size."""
    size = sa.func.coalesce(sa.func.sum(artifacts.c.size), 0)
    mine = sa.select(size).select_from(artifacts.join(jobs)).where(jobs.c.tenant == tenant)
    sent = sa.func.coalesce(sa.func.sum(uploads.c.size), 0)
    theirs = sa.select(sent).where(uploads.c.tenant == tenant)
    return sum(int(conn.execute(query).scalar_one()) for query in (mine, theirs))


def _get(conn: sa.Connection, job_id: str, tenant: str | None, *, lock: bool = False) -> JobRecord:
    row = conn.execute(_LOCKED if lock else _BY_ID, {"wanted": job_id}).one_or_none()
    if row is None or tenant not in (None, row.tenant):
        raise JobNotFound(job_id)
    return job_record(row)


def _seen(conn: sa.Connection, job: JobRecord) -> Seen:
    delivery = None
    if job.webhook_url is not None:
        row = conn.execute(_DELIVERY, {"wanted": job.id}).one_or_none()
        delivery = Delivery() if row is None else Delivery(**row._mapping)
    return Seen(job, delivery, read_queues(conn, [job]))


def _shown_as(state: ShownState) -> sa.ColumnElement[bool]:
    asked = jobs.c.cancel_requested_at.is_not(None)
    if state == "cancelling":
        return sa.and_(jobs.c.state.in_(sorted(ACTIVE)), asked)
    if state in ACTIVE:
        return sa.and_(jobs.c.state == state, sa.not_(asked))
    return jobs.c.state == state


def _fair_rank(tenant: sa.BindParameter[str]) -> sa.ColumnElement[int]:
    """Start-time fair queueing: max(rank of the head of the queue, the tenant's last rank + 1).

    Jobs run in ascending rank, so tenants take turns however many jobs each has waiting, and a
    tenant that was idle gains no credit. (Goyal, Vin, Cheng 1996, with unit cost per job.)
    """
    ranks = sa.func.max(jobs.c.fair_rank)
    last = sa.select(sa.func.coalesce(ranks + 1, 0)).where(jobs.c.tenant == tenant)
    head = sa.select(jobs.c.fair_rank).where(jobs.c.state == QUEUED).order_by(jobs.c.fair_rank)
    newest = sa.select(sa.func.coalesce(ranks, 0))
    virtual = sa.func.coalesce(head.limit(1).scalar_subquery(), newest.scalar_subquery())
    return larger(last.scalar_subquery(), virtual)


def new_job(
    spec: AnySpec, *, cell: tuple[str, int] | None = None, **columns: Any
) -> dict[str, Any]:
    """Columns of a new job that `insert_job` takes: those of the specification, and the given.

    cell: a sweep's id and the number of the cell that the job is of.
    """
    sweep_id, number = cell or (None, None)
    return columns | _of_spec(spec) | {"sweep_id": sweep_id, "cell": number}


_COUNTS = ("attempt", "lost_count", "crash_count", "oom_count", "handback_count", "token")
_GIVEN = ("id", "kind", "tenant", "spec", "model", "label", "queue", "priority")
_OPTIONAL = dict.fromkeys(
    (
        *("parent_id", "webhook_url", "created_by", "max_running", "keep_days"),
        *("sweep_id", "cell", "deadline_s"),
    )
)
# Built once: taking a statement apart costs more than the database does.
_INSERT = (
    sa.insert(jobs)
    .values(
        {name: sa.bindparam(name) for name in (*_GIVEN, *_OPTIONAL) if name in jobs.c}
        | dict.fromkeys((*_COUNTS, "log_size"), 0)
        | {
            "state": "queued",
            "fair_rank": _fair_rank(sa.bindparam("tenant", type_=jobs.c.tenant.type)),
            "deadline_at": db_now() + sa.bindparam("deadline_s", type_=sa.Double()),
            "not_before": 0.0,
            "created_at": db_now(),
            "queued_at": db_now(),
            "next_seq": 2,
            "schema_version": 1,
        }
    )
    .returning(*jobs.c)
)


def check_same_request(key: str, stored: str, request_hash: str) -> None:
    """Raise `IdempotencyMismatch` unless the key was used with a request of this hash."""
    if stored != request_hash:
        raise IdempotencyMismatch(
            f"idempotency key {key!r} was used with a different request body: "
            "send the same body or a new key",
            param="Idempotency-Key",
        )


def _insert_sealed(
    conn: sa.Connection, values: dict[str, Any], sealed: Callable[[str], bytes] | None
) -> JobRecord:
    job = insert_job(conn, values)
    if sealed is not None:
        conn.execute(sa.insert(push_tokens).values(job_id=job.id, sealed=sealed(job.id)))
    return job


def insert_child(conn: sa.Connection, parent: JobRecord, spec: AnySpec) -> JobRecord:
    """Store a queued job that works on the files of `parent`, for whom that one was made."""
    taken = ("tenant", "priority", "webhook_url", "created_by", "max_running", "keep_days")
    inherited = {name: getattr(parent, name) for name in taken}
    own = {"parent_id": parent.id, "queue": TIERS[0]}
    return insert_job(conn, _of_spec(spec) | inherited | own)


def _of_spec(spec: AnySpec) -> dict[str, Any]:
    """The columns of a new job that its specification decides."""
    return {
        "id": new_id(),
        "kind": spec.kind,
        "spec": spec.model_dump(mode="json"),
        "model": model_name(spec.model),
        "label": spec.label,
        "deadline_s": spec.deadline_s,
    }


def insert_job(conn: sa.Connection, given: dict[str, Any]) -> JobRecord:
    """Store a queued job of these columns and its first event; raises what `hold` raises."""
    hold(conn, given["kind"], given["spec"])
    job = job_record(conn.execute(_INSERT, _OPTIONAL | given).one())
    told = {"parent_id": job.parent_id, "by": job.created_by}
    first = {"state": "queued"} | {name: value for name, value in told.items() if value}
    insert_event(conn, job.id, 1, "state", first)
    return job
