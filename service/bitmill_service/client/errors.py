"""What the client raises.

BitmillError
└── ServiceError          the service refused; carries the problem document's members
    ├── Unauthorized      401 or 403
    └── Unreachable       no answer at all
JobFailed, JobCancelled, WaitTimeout   how `Client.wait` may end otherwise than well
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx2

from bitmill.errors import BitmillError

if TYPE_CHECKING:
    from bitmill_service.schemas import JobView


class ServiceError(BitmillError):
    """The service refused a request: `status`, `code`, `param`, `hint`, `request_id`."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        param: str | None = None,
        hint: str | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message, code=code, param=param)
        self.status, self.hint, self.request_id = status, hint, request_id


class Unauthorized(ServiceError):
    """The service wants other credentials."""


class Unreachable(ServiceError):
    """The service did not answer."""

    code = "unreachable"


class JobOutcome(BitmillError):
    """A job ended otherwise than with success; `job` is its last state."""

    def __init__(self, job: JobView, message: str, *, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.job = job


class JobFailed(JobOutcome):
    """The job failed."""

    code = "job_failed"


class JobCancelled(JobOutcome):
    """The job was cancelled."""

    code = "cancelled"


class WaitTimeout(JobOutcome):
    """The job had not finished within the given time; it goes on."""

    code = "timeout"


def raise_for_problem(response: httpx2.Response) -> None:
    """Raise the `ServiceError` that a refused request's problem document describes."""
    if response.status_code < 400:
        return
    try:
        body: Any = response.json()
    except ValueError:
        body = {}
    if not isinstance(body, dict):
        body = {}
    kind = Unauthorized if response.status_code in (401, 403) else ServiceError
    detail = body.get("detail") or f"{response.request.url} answered {response.status_code}"
    raise kind(
        str(detail),
        status=response.status_code,
        code=body.get("code") or f"http_{response.status_code}",
        param=body.get("param"),
        hint=body.get("hint"),
        request_id=body.get("request_id") or response.headers.get("x-request-id"),
    )
