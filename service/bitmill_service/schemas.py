"""What the API answers, and what the client returns: one set of types for both sides.

Readers ignore members they do not know, so an older client works with a newer service. Times are
UTC, RFC 3339. Sizes are bytes.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.closed import Closed
from bitmill.config.quantization import Allocation, Budget
from bitmill.pipeline.estimate import Estimate
from bitmill.reporting.sweep_table import SweepRow, SweepTable
from bitmill.results import QualityRow
from bitmill_workers.job_spec import JobKind
from bitmill_workers.store.limits import KEY_NAME, Limits
from bitmill_workers.store.limits import Scope as KeyScope
from bitmill_workers.store.states import TERMINAL, ShownState
from bitmill_workers.sweep_spec import value_text


class View(BaseModel):
    """Base of everything the API answers."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class Problem(View):
    """A refusal (RFC 9457): `code` is stable, `param` names what is at fault, `hint` what to do."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    param: str | None = None
    hint: str
    kind: str | None = None
    request_id: str | None = None


class JobError(View):
    """Why a job failed: `code` is stable, `message` names the value, `hint` says what to do.

    kind: the error's class below its bases, such as "InputError.ModelError".
    """

    code: str
    message: str
    param: str | None = None
    hint: str | None = None
    kind: str | None = None


class JobProgress(View):
    """How far the current stage is: `done` of `total` units."""

    stage: str
    done: int
    total: int
    unit: str


class JobLinks(View):
    """Paths of a job's parts."""

    self: str
    events: str
    logs: str
    cancel: str
    retry: str
    bit_width_map: str
    report: str
    files: str
    exports: str = ""
    push: str = ""


class WebhookView(View):
    """How far the message about a job's end is; `last_error` says why it was not taken."""

    state: Literal["waiting", "delivering", "delivered", "failed"]
    tries: int = 0
    next_try: datetime | None = None
    delivered_at: datetime | None = None
    last_error: str | None = None


class JobView(View):
    """One job. kind: an export or a push has `parent_id`, the job whose files it works on.

    queue_position: how many jobs of its queue run before a queued one; waits_for: why it waits, in
    words. eta: a guess of when it finishes, eta_range: from when to when that may be; null until
    there is ground for one. sweep_id, cell: of
    which cell of a sweep it is the job, counted from 1. files_until: when its files will be
    discarded, unless it is `pinned`; discarded_at: when they were.
    """

    id: str
    kind: JobKind = "quantize"
    state: ShownState
    stage: str | None = None
    progress: JobProgress | None = None
    eta: datetime | None = None
    eta_range: tuple[datetime, datetime] | None = None
    queue_position: int | None = None
    waits_for: str | None = None
    attempt: int = 0
    label: str | None = None
    model: dict[str, Any]
    spec: dict[str, Any]
    created_at: datetime
    started_at: datetime | None = None
    finalizing_at: datetime | None = None
    finished_at: datetime | None = None
    cancel_requested_at: datetime | None = None
    error: JobError | None = None
    result: dict[str, Any] | None = None
    profile_id: str | None = None
    parent_id: str | None = None
    sweep_id: str | None = None
    cell: int | None = None
    webhook: WebhookView | None = None
    pinned: bool = False
    files_until: datetime | None = None
    discarded_at: datetime | None = None
    links: JobLinks

    @property
    def terminal(self) -> bool:
        """Whether the job's state can no longer change."""
        return self.state in TERMINAL


class JobPage(View):
    """Jobs, newest first; pass `next` as `after` for the following page."""

    jobs: list[JobView]
    next: str | None = None


CellState = ShownState | Literal["deleted"]


class CellView(View):
    """One cell of a sweep: values by the paths of its axes, and the newest job of it.

    state: "deleted" where there is none any more. quality: the row of the quality report that is
    the packed checkpoint's. seconds: from the job's start to its end. alone_s: wall time of all of
    its stages, those too that another cell made.
    """

    cell: int
    values: dict[str, Any]
    state: CellState
    job_id: str | None = None
    stage: str | None = None
    progress: JobProgress | None = None
    quality: QualityRow | None = None
    seconds: float | None = None
    alone_s: float | None = None
    error: JobError | None = None

    @property
    def row(self) -> SweepRow:
        """Its line of the table."""
        return SweepRow(
            cell=self.cell,
            axes={path: value_text(value) for path, value in self.values.items()},
            state=self.state,
            job=self.job_id,
            quality=self.quality,
            seconds=self.seconds,
            alone_s=self.alone_s,
            error=None if self.error is None else self.error.message,
        )


class SweepLinks(View):
    """Paths of a sweep's parts."""

    self: str
    cancel: str
    events: str
    table: str
    plot: str


class SweepView(View):
    """One sweep. counts: of cells by their state; `finished` when none will change any more.

    spec and cells are left out of lists.
    """

    id: str
    label: str | None = None
    created_at: datetime
    created_by: str | None = None
    finished: bool
    counts: dict[str, int]
    axes: list[str]
    spec: dict[str, Any] | None = None
    cells: list[CellView] | None = None
    links: SweepLinks

    @property
    def table(self) -> SweepTable:
        """What its cells found; empty where they are left out."""
        return SweepTable([cell.row for cell in self.cells or ()])


class SweepPage(View):
    """Sweeps, newest first; pass `next` as `after` for the following page."""

    sweeps: list[SweepView]
    next: str | None = None


class EventView(View):
    """One event of a job. `seq` counts from 1 without gaps."""

    seq: int
    at: datetime
    kind: str
    data: dict[str, Any]


class SweepEventView(EventView):
    """One event of a job of a sweep."""

    cell: int
    job_id: str


class EventPage(View):
    """Events after `after`; `end` says that no event will ever follow `next_after`."""

    events: list[EventView]
    next_after: int
    end: bool


class LogPage(View):
    """A piece of the job's log from byte `offset`; ask again from `next_offset` until `end`."""

    offset: int
    next_offset: int
    text: str
    end: bool


class FileView(View):
    """One file of a finished job: its path within the checkpoint folder, bytes and hex SHA-256."""

    path: str
    size: int
    sha256: str
    url: str


class FileList(View):
    """All files of a finished job."""

    job_id: str
    files: list[FileView]
    total_size: int


class ExportView(View):
    """An export: bytes of all files that hold tensors, and of those of the packed folder."""

    format: str
    linears: int
    tensors: int
    file_bytes: int
    packed_bytes: int


class SizeView(View):
    """What one width everywhere costs, in the units of the three budgets."""

    width: int
    code_bits: float
    bits: float
    size: int


class ExportSizeView(View):
    """Bytes of an export with the smallest legal width everywhere, and with the largest, and the
    runtimes that read it."""

    format: str
    smallest: int
    largest: int
    runtimes: list[str] = []


class EmbeddingsView(View):
    """Bytes of input embedding and output head: as they are kept, and packed at 8 and at 4 bits."""

    kept: int
    packed: dict[int, int]


class PlanView(View):
    """What a job would work on: nothing was created.

    weights: quantized weights in all. smallest, largest: the legal widths' range. fused: linears
    of the first block that read the same input. runtimes: those that read the result as it is, of
    models that they know; what reads an export stands with it. estimate, on_accelerator: memory,
    disk and time of a runner without and with accelerators. exports: what those that were asked
    for take. embeddings: what packing them too would save; None where it is done or cannot be.
    notes: what of the source is left out and why, and what could not be checked.
    """

    model_type: str
    blocks: int
    linears: int
    groups: int
    weights: int
    fused: list[list[list[str]]]
    smallest: SizeView
    largest: SizeView
    estimate: Estimate
    on_accelerator: Estimate
    notes: list[str]
    runtimes: list[str] = []
    exports: list[ExportSizeView] = []
    embeddings: EmbeddingsView | None = None


class ProfileView(View):
    """A stored sensitivity profile; `id` is the hash of what it was made from.

    model, settings: of the caller's own job that made the same, null where that is unknown. tenant:
    whose words these are, the caller's own; an administrator, who sees everybody's, reads those of
    the tenant that was first. widths, linears and groups are counted when one profile is asked for,
    not in lists.
    """

    id: str
    tenant: str
    created_at: datetime
    model: str | None = None
    settings: dict[str, Any] | None = None
    widths: tuple[int, ...] | None = None
    linears: int | None = None
    groups: int | None = None


class ProfilePage(View):
    """Stored profiles by id; pass `next` as `after` for the following page."""

    profiles: list[ProfileView]
    next: str | None = None


class AllocationRequest(Closed):
    """A budget to spend on a stored profile.

    allocation: what it leaves open is as in the profile. curve: further budgets of the same kind;
    each gives one point of size against predicted loss. None gives the whole curve.
    """

    budget: Budget
    allocation: Allocation | None = None
    curve: tuple[float, ...] = Field(default=(), max_length=64)


class BudgetPoint(View):
    """One budget and what it buys; an impossible budget has an `error` instead."""

    budget: float
    code_bits: float | None = None
    bits: float | None = None
    size: int | None = None
    predicted_loss: float | None = None
    error: str | None = None


class AllocationView(View):
    """A bit-width map made from a profile: exact cost and predicted increase of the loss.

    curve: without budgets of one's own, knapsack maps from the smallest to the largest size.
    """

    profile_id: str
    map: BitWidthMap
    code_bits: float
    bits: float
    size: int
    predicted_loss: float | None
    curve: list[BudgetPoint] = []


class MapView(View):
    """A stored bit-width map; `id` is its content hash, `histogram` counts groups per width.

    name: what the caller calls it, whatever others call the same. tenant: who calls it so; an
    administrator, who sees everybody's, reads the name of the tenant that was first.
    shape, weights: fingerprint of the model that it is of, where that is known.
    """

    id: str
    tenant: str
    created_at: datetime
    linears: int
    groups: int
    histogram: dict[str, int]
    name: str | None = None
    shape: str | None = None
    weights: str | None = None


class MapPage(View):
    """Stored maps by id; pass `next` as `after` for the following page."""

    maps: list[MapView]
    next: str | None = None


class KeyRequest(Closed):
    """A key to make. tenant: whose jobs it works on; default is the name."""

    name: str = Field(pattern=KEY_NAME)
    tenant: str | None = Field(default=None, pattern=KEY_NAME)
    scopes: tuple[KeyScope, ...] = Field(default=("read", "submit"), min_length=1, max_length=3)
    expires_in_s: int | None = Field(default=None, ge=60, le=10 * 366 * 86400)
    limits: Limits = Limits()


class KeyView(View):
    """A key without its secret. `last_used` is exact to a minute."""

    id: str
    name: str
    tenant: str
    scopes: tuple[KeyScope, ...]
    limits: Limits
    created_at: datetime
    created_by: str | None = None
    expires_at: datetime | None = None
    last_used: datetime | None = None
    revoked_at: datetime | None = None


class NewKeyView(KeyView):
    """A key that was just made: `key` is shown this once."""

    key: str


class KeyList(View):
    """All keys, oldest first, revoked ones too."""

    keys: list[KeyView]


class QueueView(View):
    """A queue of the workers: `paused` ones give out no more jobs; how many wait and run."""

    name: str
    paused: bool
    queued: int = 0
    running: int = 0


class WorkerView(View):
    """A live worker; one that `drains` takes no more jobs. stage, progress: of its job.

    device_free, device_total: bytes of its accelerators, None on a CPU and where none can be asked.
    """

    name: str
    host: str
    queues: tuple[str, ...]
    device: str
    version: str
    last_seen: datetime
    device_free: int | None = None
    device_total: int | None = None
    job_id: str | None = None
    stage: str | None = None
    progress: JobProgress | None = None
    drains: bool


class WorkersView(View):
    """All queues, and all workers seen lately."""

    queues: list[QueueView]
    workers: list[WorkerView]


class UploadEntry(Closed):
    """A file that will be sent: path within the folder, bytes, hex SHA-256."""

    path: str = Field(min_length=1, max_length=512)
    size: int = Field(ge=0, lt=2**50)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class UploadRequest(Closed):
    """The files of a model's folder, or of one of learned parameters."""

    files: tuple[UploadEntry, ...] = Field(min_length=1, max_length=2048)


class UploadFileView(View):
    """A file of an upload; `received` are the numbers of its parts that have come, from 0."""

    path: str
    size: int
    sha256: str
    parts: int
    received: list[int]


class UploadView(View):
    """An upload. Every part but a file's last has `part_size` bytes."""

    id: str
    state: Literal["open", "complete"]
    size: int
    part_size: int
    created_at: datetime
    created_by: str | None = None
    expires_at: datetime
    files: list[UploadFileView]


class UploadList(View):
    """Uploads, oldest first, without their parts."""

    uploads: list[UploadView]


class Health(View):
    """Whether the process answers, and which version it is."""

    status: Literal["ok"]
    version: str


class Readiness(View):
    """Whether the service can take jobs; `checks` names each part and its state."""

    ready: bool
    checks: dict[str, str]
