"""What an API key may do, and how much: words that clients know as well. No database here."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase
from typing import Annotated, Final, Literal

from pydantic import BeforeValidator, Field, model_validator

from bitmill.config.closed import Closed

Scope = Literal["read", "submit", "admin"]
SCOPES: Final[tuple[Scope, ...]] = ("read", "submit", "admin")
KEY_NAME = r"^[A-Za-z0-9_.@-]{1,64}$"
"""The form of names of keys and of tenants."""


def _whole(value: object) -> object:
    """JSON has one kind of number: 3.0 is the integer 3, as its schema says."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_Priority = Annotated[int, Field(strict=True, ge=-100, le=100), BeforeValidator(_whole)]
_Count = Annotated[int, Field(strict=True, ge=0), BeforeValidator(_whole)]
_Positive = Annotated[int, Field(strict=True, ge=1), BeforeValidator(_whole)]


class Limits(Closed):
    """What a key may take; None: as much as the service gives anybody.

    requests_per_minute: of all calls but downloads. queued, running: jobs of the key's tenant.
    bytes: kept results and uploads of the tenant. keep_days: how long the files of its
    jobs are kept after their end. keep_bytes: what results of the tenant may take before the oldest
    go (`store/retention.py`). priorities: lowest and highest of its jobs.
    hub_repositories: patterns (`org/*`) of the Hub repositories that may be fetched with the
    operator's token; all others are fetched without one.
    """

    requests_per_minute: _Positive | None = None
    queued: _Count | None = None
    running: _Count | None = None
    bytes: _Count | None = None
    keep_days: float | None = Field(default=None, strict=True, gt=0)
    keep_bytes: _Positive | None = None
    priorities: tuple[_Priority, _Priority] = (-100, 0)
    hub_repositories: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _ordered(self) -> Limits:
        low, high = self.priorities
        if low > high:
            raise ValueError(f"priorities {low} to {high} must ascend")
        return self


def may_use_hub_token(scopes: Collection[Scope], limits: Limits, repo_id: str) -> bool:
    """Whether the operator's Hub token may be spent on this repository; admins may on any."""
    allowed = limits.hub_repositories
    return "admin" in scopes or any(fnmatchcase(repo_id, pattern) for pattern in allowed)
