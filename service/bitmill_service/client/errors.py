"""What the client raises.

BitmillError
├── ServiceError          the service refused; carries the problem document's members
│   ├── Unauthorized      401 or 403
│   └── Unreachable       no answer at all
└── JobOutcome            how `Client.wait` may end otherwise than well
    ├── JobFailed         `error` is what the job failed with, as it left the worker
    ├── JobCancelled
    └── WaitTimeout

A refusal by the layers below is also of the class that it has there: `except BudgetError` takes an
impossible budget whether a service or the library refused it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from bitmill.errors import BitmillError

if TYPE_CHECKING:
    from bitmill_service.schemas import JobView

_Model = TypeVar("_Model", bound=BaseModel)


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
        # Not super(): a class of the service, mixed in by `_class_of`, may want other arguments.
        BitmillError.__init__(self, message, code=code, param=param, hint=hint)
        self.status, self.request_id = status, request_id


class Unauthorized(ServiceError):
    """The service wants other credentials."""


class Unreachable(ServiceError):
    """The service did not answer."""

    code = "unreachable"


class JobOutcome(BitmillError):
    """A job ended otherwise than with success; `job` is its last state."""

    def __init__(self, job: JobView, message: str) -> None:
        super().__init__(message)
        self.job = job


class JobFailed(JobOutcome):
    """The job failed with `error`, whose code, parameter and hint are this one's too."""

    code = "job_failed"

    def __init__(self, job: JobView) -> None:
        self.error = BitmillError.from_dict(job.error.model_dump() if job.error else {})
        super().__init__(job, f"job {job.id} failed: {self.error.message}")
        if job.error is not None:
            self.code, self.param = self.error.code, self.error.param
            self.hint = self.error.hint


class JobCancelled(JobOutcome):
    """The job was cancelled."""

    code = "cancelled"


class WaitTimeout(JobOutcome):
    """The job had not finished within the given time; it goes on."""

    code = "timeout"


def raise_for_problem(response: httpx2.Response) -> None:
    """Raise the `ServiceError` that a refused request's problem document describes."""
    if response.has_redirect_location:
        target = response.url.join(response.headers["location"])
        raise ServiceError(
            f"the service sends this request on to {target.scheme}://"
            f"{target.netloc.decode('ascii')}: set BITMILL_URL to that address",
            status=response.status_code,
            code="redirected",
        )
    if response.status_code < 400:
        return
    try:
        body: Any = response.json()
    except ValueError:
        body = {}
    if not isinstance(body, dict):
        body = {}
    detail = body.get("detail") or f"{response.request.url} answered {response.status_code}"
    raise _class_of(response.status_code, body)(
        str(detail),
        status=response.status_code,
        code=body.get("code") or f"http_{response.status_code}",
        param=body.get("param"),
        hint=body.get("hint"),
        request_id=body.get("request_id") or response.headers.get("x-request-id"),
    )


def _class_of(status: int, problem: dict[str, Any]) -> type[ServiceError]:
    """`ServiceError`, and the class that the error had in the service where that is known here."""
    if status in (401, 403):
        return Unauthorized
    kind = type(BitmillError.from_dict(problem))
    if kind is BitmillError or issubclass(kind, ServiceError):
        return ServiceError
    return type(f"Service{kind.__name__}", (ServiceError, kind), {})


def read_answer(kind: type[_Model], response: httpx2.Response) -> _Model:
    """The answer as a typed value; raises `ServiceError` (code `unexpected_answer`)."""
    try:
        return kind.model_validate_json(response.content)
    except ValidationError as error:
        raise ServiceError(
            f"{response.request.url} answered something that is no {kind.__name__}: is a Bitmill "
            "service behind this address?",
            status=response.status_code,
            code="unexpected_answer",
        ) from error
