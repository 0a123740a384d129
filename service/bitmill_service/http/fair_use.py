"""How many calls a key may make: one bucket for each key, counted in this process.

A key may make `q` calls in 60 seconds, all at once or spread out (generic cell rate algorithm: the
bucket fills at q / 60 calls a second). Every answer tells what is left, by the fields `RateLimit`
and `RateLimit-Policy` of draft-ietf-httpapi-ratelimit-headers. Downloads are not counted: what
they take is bounded by connections. Each replica counts for itself.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bitmill_service.http.access import Principal
from bitmill_service.http.problems import ProblemError, problem_response

WINDOW_S = 60
_MOST = 10_000
_DOWNLOAD = re.compile(r"/v1/jobs/[^/]+/files/.|/[^/]+/[^/]+/resolve/")


@dataclass(frozen=True, slots=True)
class Grant:
    """A call that may be made: what the key may do, and what is left of it now."""

    calls: int
    left: int

    @property
    def headers(self) -> Mapping[str, str]:
        """The fields that tell the client."""
        full_in = math.ceil((self.calls - self.left) * WINDOW_S / self.calls)
        return {
            "ratelimit-policy": f'"key";q={self.calls};w={WINDOW_S}',
            "ratelimit": f'"key";r={self.left};t={full_in}',
        }


class RateLimiter:
    """The buckets of this process. clock: seconds, ascending."""

    def __init__(self, calls: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._calls, self._clock = calls, clock
        self._full_at: dict[str, float] = {}

    def take(self, caller: Principal, path: str) -> Grant | None:
        """Count a call; None where it is not counted. Raises `ProblemError` `rate_limited`."""
        if caller.key_id is None or _DOWNLOAD.match(path):
            return None
        calls = caller.limits.requests_per_minute or self._calls
        each, now = WINDOW_S / calls, self._clock()
        full_at = max(self._full_at.get(caller.key_id, now), now) + each
        over = full_at - now - WINDOW_S
        if over > 1e-9:
            raise ProblemError(
                "rate_limited",
                f"the key {caller.key_id} may make {calls} calls in {WINDOW_S} s",
                param="Authorization",
                headers={
                    "Retry-After": str(math.ceil(over)),
                    **Grant(calls, 0).headers,
                },
            )
        if len(self._full_at) >= _MOST:
            self._full_at = {key: at for key, at in self._full_at.items() if at > now}
        self._full_at[caller.key_id] = full_at
        return Grant(calls, int((WINDOW_S - (full_at - now)) / each + 1e-9))


class FairUse:
    """Counts the calls of keys and tells what is left. Plain ASGI, behind `Access`."""

    def __init__(self, app: ASGIApp, limiter: RateLimiter) -> None:
        self.app, self.limiter = app, limiter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = scope.get("state", {}).get("principal")
        if caller is None or caller.key_id is None:
            await self.app(scope, receive, send)
            return
        try:
            grant = self.limiter.take(caller, scope["path"])
        except ProblemError as refusal:
            await problem_response(Request(scope), refusal)(scope, receive, send)
            return

        async def tell(message: Message) -> None:
            if grant is not None and message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(grant.headers)
            await send(message)

        await self.app(scope, receive, tell)
