"""From stored records to what the API answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from bitmill.allocation.profile import SensitivityProfile
from bitmill.config.bit_width_map import BitWidthMap
from bitmill_service import schemas
from bitmill_workers.store.keys import KeyRecord
from bitmill_workers.store.records import (
    Artifact,
    Delivery,
    Event,
    JobRecord,
    LogPage,
    MapRecord,
    ProfileRecord,
)
from bitmill_workers.store.tables import DELIVERY_TRIES
from bitmill_workers.store.uploads import PART_BYTES, UploadRecord


def moment(seconds: float | None) -> datetime | None:
    """UTC time of seconds since the epoch."""
    return None if seconds is None else _moment(seconds)


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


_PARTS = ("events", "logs", "cancel", "retry", "files", "exports", "push")


def job_links(job_id: str) -> schemas.JobLinks:
    """Paths of a job's parts."""
    base = f"/v1/jobs/{job_id}"
    return schemas.JobLinks.model_validate(
        {
            "self": base,
            **{name: f"{base}/{name}" for name in _PARTS},
            "bit_width_map": f"{base}/bit-width-map",
            "report": f"{base}/report",
        }
    )


def job_view(
    job: JobRecord,
    *,
    queue_position: int | None = None,
    waits_for: str | None = None,
    delivery: Delivery | None = None,
) -> schemas.JobView:
    """One job as clients see it; the owner, lease, token and webhook's address stay inside."""
    error = job.error
    return schemas.JobView(
        id=job.id,
        kind=job.kind,
        state=job.shown_state,
        stage=job.stage,
        progress=None if job.finished else progress_view(job.progress),
        eta=moment(job.estimated_finish),
        eta_range=_eta_range(job),
        queue_position=queue_position,
        waits_for=waits_for,
        attempt=job.attempt,
        label=job.label,
        model=job.spec["model"],
        spec=job.spec,
        created_at=_moment(job.created_at),
        started_at=moment(job.started_at),
        finalizing_at=moment(job.finalizing_at),
        finished_at=moment(job.finished_at),
        cancel_requested_at=moment(job.cancel_requested_at),
        error=None if error is None else schemas.JobError.model_validate(error.to_dict()),
        result=_result(job.result),
        profile_id=job.profile_id,
        parent_id=job.parent_id,
        sweep_id=job.sweep_id,
        cell=job.cell,
        webhook=None if delivery is None else _webhook(delivery),
        pinned=job.pinned,
        files_until=_files_until(job),
        discarded_at=moment(job.discarded_at),
        links=job_links(job.id),
    )


def _eta_range(job: JobRecord) -> tuple[datetime, datetime] | None:
    """From when to when the job may finish, by what its runner told with its progress."""
    margin = (job.progress or {}).get("margin_s")
    if job.estimated_finish is None or margin is None:
        return None
    first, last = (_moment(job.estimated_finish + seconds) for seconds in margin)
    return first, last


def _files_until(job: JobRecord) -> datetime | None:
    if job.pinned or job.keep_days is None or job.finished_at is None or job.discarded_at:
        return None
    return moment(job.finished_at + job.keep_days * 86400.0)


def _webhook(delivery: Delivery) -> schemas.WebhookView:
    state: Literal["waiting", "delivering", "delivered", "failed"]
    if delivery.delivered_at is not None:
        state = "delivered"
    elif delivery.next_try is None:
        state = "waiting"
    else:
        state = "failed" if delivery.tries >= DELIVERY_TRIES else "delivering"
    return schemas.WebhookView(
        state=state,
        tries=delivery.tries,
        next_try=moment(delivery.next_try) if state == "delivering" else None,
        delivered_at=moment(delivery.delivered_at),
        last_error=delivery.last_error,
    )


def _result(result: dict[str, Any] | None) -> dict[str, Any] | None:
    """The result with the table of the quality report; the report itself has its own route."""
    if result is None or not isinstance(result.get("quality"), dict):
        return result
    rest = {key: value for key, value in result.items() if key != "quality"}
    return rest | {"rows": result["quality"].get("rows", [])}


def progress_view(progress: dict[str, Any] | None) -> schemas.JobProgress | None:
    """None where the last event counted nothing."""
    if not progress or progress.get("done") is None or progress.get("total") is None:
        return None
    return schemas.JobProgress(
        stage=progress["stage"],
        done=progress["done"],
        total=progress["total"],
        unit=progress.get("unit") or "",
    )


def event_view(event: Event) -> schemas.EventView:
    """One event; the same bytes in a page and in a stream."""
    return schemas.EventView(
        seq=event.seq, at=_moment(event.time), kind=event.kind, data=event.data
    )


def log_view(page: LogPage, *, finished: bool) -> schemas.LogPage:
    """Text of a piece of the log; a character cut in two at the end is left for the next piece."""
    data = page.data
    last = page.next_offset >= page.size
    if not (last and finished):
        data = _whole_characters(data)
    return schemas.LogPage(
        offset=page.offset,
        next_offset=page.offset + len(data),
        text=data.decode("utf-8", "replace"),
        end=finished and page.offset + len(data) >= page.size,
    )


def _whole_characters(data: bytes) -> bytes:
    for cut in range(1, min(4, len(data)) + 1):
        byte = data[-cut]
        if byte < 0x80:
            break
        if byte >= 0xC0:
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return data[:-cut] if cut < needed else data
    return data


def file_view(job_id: str, artifact: Artifact) -> schemas.FileView:
    """One published file and where to get it."""
    return schemas.FileView(
        path=artifact.path,
        size=artifact.size,
        sha256=artifact.sha256,
        url=f"/v1/jobs/{job_id}/files/{artifact.path}",
    )


def key_view(record: KeyRecord) -> schemas.KeyView:
    """A key without its secret."""
    return schemas.KeyView(
        id=record.id,
        name=record.name,
        tenant=record.tenant,
        scopes=record.scopes,
        limits=record.limits,
        created_at=_moment(record.created_at),
        created_by=record.created_by,
        expires_at=moment(record.expires_at),
        last_used=moment(record.last_used),
        revoked_at=moment(record.revoked_at),
    )


def upload_view(
    record: UploadRecord, received: Mapping[str, Sequence[int]] | None = None
) -> schemas.UploadView:
    """An upload, with the parts that have come where they were looked up."""
    return schemas.UploadView(
        id=record.id,
        state=record.state,
        size=record.size,
        part_size=PART_BYTES,
        created_at=_moment(record.created_at),
        created_by=record.created_by,
        expires_at=_moment(record.expires_at),
        files=[
            schemas.UploadFileView(
                path=file.path,
                size=file.size,
                sha256=file.sha256,
                parts=file.parts,
                received=list((received or {}).get(file.path, ())),
            )
            for file in record.files
        ],
    )


def map_view(record: MapRecord) -> schemas.MapView:
    """What a stored map holds."""
    widths = BitWidthMap.model_validate(record.map).linears.values()
    histogram = Counter(width for groups in widths for width in groups)
    return schemas.MapView(
        id=record.id,
        tenant=record.tenant,
        created_at=_moment(record.created_at),
        linears=len(widths),
        groups=sum(histogram.values()),
        histogram={str(width): histogram[width] for width in sorted(histogram)},
        name=record.name,
        shape=record.shape,
        weights=record.weights,
    )


def profile_view(
    record: ProfileRecord, profile: SensitivityProfile | None = None
) -> schemas.ProfileView:
    """A stored profile; widths and counts where the profile itself was read."""
    return schemas.ProfileView(
        id=record.id,
        tenant=record.tenant,
        created_at=_moment(record.created_at),
        model=record.model,
        settings=record.settings,
        widths=None if profile is None else profile.widths,
        linears=None if profile is None else len(profile.linears),
        groups=None if profile is None else sum(p.shape.groups for p in profile.linears),
    )
