"""What the store returns: frozen copies of rows. Times are seconds since the epoch."""

from __future__ import annotations

import secrets
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.made_for import MadeFor
from bitmill.errors import BitmillError
from bitmill_workers.job_spec import JobKind
from bitmill_workers.store.states import TERMINAL, ShownState, State, shown_state
from bitmill_workers.store.tables import jobs


def new_id() -> str:
    """A UUID of version 7 (RFC 9562): sorts by creation time to the millisecond."""
    value = time.time_ns() // 1_000_000 << 80 | secrets.randbits(80)
    value = value & ~(0xF << 76) | 7 << 76
    value = value & ~(0x3 << 62) | 2 << 62
    return str(uuid.UUID(int=value))


def is_id(name: str) -> bool:
    """Whether `new_id` may have made it, so that what bears it as its name is ours."""
    with suppress(ValueError):
        return str(uuid.UUID(name)) == name and uuid.UUID(name).version == 7
    return False


@dataclass(frozen=True, slots=True)
class JobRecord:
    """One job. `spec` is the stored specification, `result` and `progress` are the runner's."""

    id: str
    kind: JobKind
    tenant: str
    state: State
    stage: str | None
    spec: dict[str, Any]
    model: str
    label: str | None
    priority: int
    fair_rank: int
    queue: str
    attempt: int
    lost_count: int
    crash_count: int
    oom_count: int
    handback_count: int
    token: int
    owner: str | None
    lease_until: float | None
    not_before: float
    deadline_at: float | None
    cancel_requested_at: float | None
    sent_at: float | None
    created_at: float
    queued_at: float
    started_at: float | None
    finalizing_at: float | None
    finished_at: float | None
    estimated_finish: float | None
    progress: dict[str, Any] | None
    error_code: str | None
    error_message: str | None
    error_param: str | None
    error_kind: str | None
    error_hint: str | None
    result: dict[str, Any] | None
    profile_id: str | None
    parent_id: str | None
    webhook_url: str | None
    next_seq: int
    log_size: int
    schema_version: int
    created_by: str | None
    max_running: int | None
    pinned: bool
    keep_days: float | None
    discarded_at: float | None
    sweep_id: str | None
    cell: int | None

    @property
    def shown_state(self) -> ShownState:
        """The state as clients see it: `cancelling` while a cancelled runner still lives."""
        return shown_state(self.state, self.cancel_requested_at is not None)

    @property
    def finished(self) -> bool:
        """True in a terminal state."""
        return self.state in TERMINAL

    @property
    def error(self) -> BitmillError | None:
        """Why the job failed; of its class where the row was written by a version that kept it."""
        if self.error_code is None:
            return None
        told = {
            "kind": self.error_kind,
            "code": self.error_code,
            "message": self.error_message,
            "param": self.error_param,
            "hint": self.error_hint,
        }
        return BitmillError.from_dict(told)


def error_columns(error: BitmillError) -> dict[str, str | None]:
    """The columns that say why a job failed; what none can hold must not keep it from ending.

    An error's texts are printable, so none holds the NUL character that PostgreSQL refuses.
    """
    columns = {}
    for name, text in error.to_dict().items():
        column = jobs.c[f"error_{name}"]
        most = getattr(column.type, "length", None)
        columns[column.name] = text and text[:most]
    return columns


def job_record(row: sa.Row[Any]) -> JobRecord:
    """The record of a row of `jobs`."""
    return JobRecord(**row._mapping)


@dataclass(frozen=True, slots=True)
class Event:
    """One entry of a job's history; `seq` counts from 1 without gaps."""

    seq: int
    time: float
    kind: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Delivery:
    """How far a job's webhook is. `next_try` None: there is none before the job has ended."""

    tries: int = 0
    next_try: float | None = None
    delivered_at: float | None = None
    last_error: str | None = None


@dataclass(frozen=True, slots=True)
class LogPage:
    """Bytes of a job's log from `offset`; `next_offset` continues, `size` is the whole log's."""

    data: bytes
    offset: int
    next_offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Artifact:
    """One published file. `storage_key` locates it in the artifact store."""

    path: str
    size: int
    sha256: str
    storage_key: str


@dataclass(frozen=True, slots=True)
class Submission:
    """A created job, or the one that the same idempotency key created before."""

    job: JobRecord
    replayed: bool


@dataclass(frozen=True, slots=True)
class Quota:
    """What a tenant may have: waiting jobs, running jobs, kept bytes; None is without a limit."""

    queued: int | None = None
    running: int | None = None
    bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """Jobs, newest first; `after` continues the list, None at its end."""

    jobs: tuple[JobRecord, ...]
    after: str | None


@dataclass(frozen=True, slots=True)
class Renewal:
    """Answer to a lease renewal. `held` False: fenced, stop at once and write nothing."""

    held: bool
    cancel: bool = False
    overdue: bool = False


@dataclass(frozen=True, slots=True)
class SweepRecord:
    """One sweep; `spec` is its stored specification. Its cells are jobs that name it."""

    id: str
    tenant: str
    label: str | None
    spec: dict[str, Any]
    created_at: float
    created_by: str | None


@dataclass(frozen=True, slots=True)
class CellEnd:
    """How far a job of a sweep has come: number of its last event, and whether none follows."""

    job_id: str
    cell: int
    last: int
    finished: bool


@dataclass(frozen=True, slots=True)
class ProfileRecord:
    """A kept sensitivity profile; `id` is the hash of what it was made from, `path` its folder.

    model, settings: of its holder's job, None where that is unknown. tenant: the holder.
    """

    id: str
    tenant: str
    model: str | None
    settings: dict[str, Any] | None
    path: str
    created_at: float


@dataclass(frozen=True, slots=True)
class MapRecord:
    """A stored bit-width map; `id` is the hash of `map`, which says what it was made for where that
    is known.

    name: what its holder calls it. tenant: the holder. shape, weights: of that model
    (`bitmill.plan.fingerprint`); older rows have these two alone.
    """

    id: str
    tenant: str
    name: str | None
    map: dict[str, Any]
    created_at: float
    shape: str | None = None
    weights: str | None = None

    def parsed(self) -> BitWidthMap:
        """The map, with what it was made for where that is known."""
        found = BitWidthMap.model_validate(self.map)
        known = found.made_for or MadeFor(shape=self.shape, weights=self.weights)
        if known == MadeFor():
            return found
        return found.of(known if known.model else known.model_copy(update={"model": self.name}))


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """A worker's last sign of life. device_free, device_total: bytes of its devices, None where it
    has none or cannot ask."""

    name: str
    host: str
    queues: tuple[str, ...]
    device: str
    version: str
    started_at: float
    last_seen: float
    device_free: int | None
    device_total: int | None
    job_id: str | None
    stage: str | None
    progress: dict[str, Any] | None
