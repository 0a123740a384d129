"""Errors of the job store; `code` is part of the API.

BitmillError
├── JobNotFound          no such job (HTTP 404)
├── SweepNotFound        no such sweep (HTTP 404)
├── UploadNotFound       no such upload, or none that is complete (HTTP 404)
├── KeyNotFound          no such API key (HTTP 404)
├── StateConflict        the job's state does not allow it (HTTP 409)
├── IdempotencyMismatch  the key was used with another request (HTTP 422)
├── QuotaExceeded        the tenant has as much as it may (HTTP 429)
├── StoreUnavailable     the database cannot be reached or is of another version (HTTP 503)
├── WorkerLost           workers died, or gave the job back, too often while they ran it
└── DeadlinePassed       the job was not finished within its `deadline_s`
"""

from __future__ import annotations

from bitmill.errors import BitmillError


class JobNotFound(BitmillError):
    """No job has this id."""

    code = "job_not_found"

    def __init__(self, job_id: str) -> None:
        super().__init__(f"there is no job {job_id!r}", param="job_id")


class SweepNotFound(BitmillError):
    """No sweep has this id."""

    code = "sweep_not_found"

    def __init__(self, sweep_id: str) -> None:
        super().__init__(f"there is no sweep {sweep_id!r}", param="sweep_id")


class UploadNotFound(BitmillError):
    """No upload has this id, or it is not complete."""

    code = "upload_not_found"

    def __init__(self, upload_id: str, problem: str | None = None) -> None:
        told = f"upload {upload_id!r} {problem}" if problem else f"there is no upload {upload_id!r}"
        super().__init__(told, param="upload_id")


class KeyNotFound(BitmillError):
    """No API key has this id."""

    code = "key_not_found"

    def __init__(self, key_id: str) -> None:
        super().__init__(f"there is no key {key_id!r}", param="key_id")


class StateConflict(BitmillError):
    """The job's state does not allow what was asked."""

    code = "state_conflict"


class IdempotencyMismatch(BitmillError):
    """An idempotency key was used before with a different request."""

    code = "idempotency_mismatch"


class QuotaExceeded(BitmillError):
    """The tenant has as much as its key allows: code `quota_queued` or `quota_bytes`."""

    code = "quota_queued"


class StoreUnavailable(BitmillError):
    """The database cannot be reached, or its schema is not the one this version needs."""

    code = "store_unavailable"
    hint = "Try again soon; the server's log says what is wrong."


class WorkerLost(BitmillError):
    """Workers died, or gave the job back, too often while they ran it."""

    code = "worker_lost"
    hint = "Look at the workers' logs and memory, then retry: finished stages are kept."


class DeadlinePassed(BitmillError):
    """The job was not finished within its `deadline_s`."""

    code = "deadline"
    hint = "Give a larger deadline_s, or none."
