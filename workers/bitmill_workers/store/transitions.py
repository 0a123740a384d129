"""The one way a job changes state: a conditional UPDATE and its event in the same transaction.

An event's number comes from the row's own counter, so numbers have no gaps: a transaction that
does not commit gives its number back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.sql.dml import ReturningUpdate

from bitmill_workers.store.db import db_now
from bitmill_workers.store.records import JobRecord, job_record
from bitmill_workers.store.states import ACTIVE, TERMINAL, State, sources_of
from bitmill_workers.store.tables import job_events, jobs, outbox, push_tokens

_NO_OWNER = {"owner": None, "lease_until": None}
_INSERT_EVENT = sa.insert(job_events).values(
    job_id=sa.bindparam("job_id"),
    seq=sa.bindparam("seq"),
    time=db_now(),
    kind=sa.bindparam("kind"),
    data=sa.bindparam("data"),
)


def transition(
    conn: sa.Connection,
    job: sa.ColumnElement[bool],
    target: State,
    *,
    sources: Iterable[State] | None = None,
    where: Sequence[sa.ColumnElement[bool]] = (),
    values: dict[str, Any] | None = None,
    event: dict[str, Any] | None = None,
) -> JobRecord | None:
    """Move the one job that `job` selects to `target`; None where the conditions do not hold.

    `sources` narrows the legal source states; `values` are further columns, `event` further data
    of the "state" event. Entering a terminal state queues the job's webhook.
    """
    statement = edge(job, target, sources=sources, where=where, values=values)
    return follow(conn, statement, target, event=event)


def edge(
    job: sa.ColumnElement[bool],
    target: State,
    *,
    sources: Iterable[State] | None = None,
    where: Sequence[sa.ColumnElement[bool]] = (),
    values: dict[str, Any] | None = None,
) -> ReturningUpdate[Any]:
    """The conditional UPDATE of `transition`, to be kept where it is made often."""
    legal = sources_of(target) & frozenset(sources or sources_of(target))
    columns: dict[str, Any] = {"state": target, "next_seq": jobs.c.next_seq + 1}
    if target not in ACTIVE:
        columns |= _NO_OWNER
    if target == "queued":
        columns |= {"queued_at": db_now(), "sent_at": None, "stage": None, "progress": None}
    if target in TERMINAL:
        columns |= {"finished_at": db_now(), "estimated_finish": None}
    return (
        sa.update(jobs)
        .where(job, jobs.c.state.in_([sa.literal(state) for state in sorted(legal)]), *where)
        .values(columns | (values or {}))
        .returning(*jobs.c)
    )


def follow(
    conn: sa.Connection,
    statement: ReturningUpdate[Any],
    target: State,
    *,
    parameters: dict[str, Any] | None = None,
    event: dict[str, Any] | None = None,
) -> JobRecord | None:
    """Execute an `edge`, with its event and webhook; None where its conditions do not hold."""
    row = conn.execute(statement, parameters or {}).one_or_none()
    if row is None:
        return None
    record = job_record(row)
    insert_event(conn, record.id, record.next_seq - 1, "state", {"state": target} | (event or {}))
    if target in TERMINAL and record.kind == "push":
        conn.execute(sa.delete(push_tokens).where(push_tokens.c.job_id == record.id))
    if target in TERMINAL and record.webhook_url:
        _queue_webhook(conn, record)
    return record


def add_events(
    conn: sa.Connection,
    job: sa.ColumnElement[bool],
    events: Sequence[tuple[str, dict[str, Any]]],
    *,
    values: dict[str, Any] | None = None,
) -> bool:
    """Append events without a change of state; False where `job` selects no row."""
    statement = (
        sa.update(jobs)
        .where(job)
        .values({"next_seq": jobs.c.next_seq + len(events)} | (values or {}))
        .returning(jobs.c.id, jobs.c.next_seq)
    )
    row = conn.execute(statement).one_or_none()
    if row is None:
        return False
    first = row.next_seq - len(events)
    for number, (kind, data) in enumerate(events):
        insert_event(conn, row.id, first + number, kind, data)
    return True


def insert_event(
    conn: sa.Connection, job_id: str, seq: int, kind: str, data: dict[str, Any]
) -> None:
    """Append one event; its number must be the row's next, which the caller counts up."""
    values = {"job_id": job_id, "seq": seq, "kind": kind, "data": data}
    conn.execute(_INSERT_EVENT, values)


def _queue_webhook(conn: sa.Connection, job: JobRecord) -> None:
    payload = {
        "job_id": job.id,
        "state": job.state,
        "finished_at": job.finished_at,
        "error_code": job.error_code,
        "label": job.label,
    }
    conn.execute(
        sa.insert(outbox).values(
            id=f"{job.id}",
            job_id=job.id,
            url=job.webhook_url,
            payload=payload,
            tries=0,
            next_try=db_now(),
            created_at=db_now(),
        )
    )
