"""When the client tries again: one rule for every request.

Wait before try k: min(8, 0.25 * 2^k) seconds times a random factor in [0.5, 1], or what the
server's `Retry-After` asks for, at most 30 s. Tried again: connection errors, timeouts and the
statuses 429, 502, 503 and 504; every request the client makes is safe to repeat, because
creations carry an Idempotency-Key.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import httpx2

RETRY_STATUS = frozenset({429, 502, 503, 504})
_LONGEST = 30.0


def retry_after(response: httpx2.Response) -> float | None:
    """Seconds of a numeric `Retry-After`, at most 30."""
    value = response.headers.get("retry-after", "")
    return min(float(value), _LONGEST) if value.isdecimal() else None


def backoff(attempt: int) -> float:
    """Seconds to wait before try `attempt` + 1."""
    return min(8.0, 0.25 * 2.0**attempt) * random.uniform(0.5, 1.0)


def with_retries(
    send: Callable[[], httpx2.Response],
    *,
    tries: int,
    sleep: Callable[[float], None] = time.sleep,
) -> httpx2.Response:
    """Call `send` until it gives an answer that is final, or the last try.

    Raises `httpx2.TransportError` where the last try got no answer at all.
    """
    for attempt in range(tries):
        last = attempt == tries - 1
        try:
            response = send()
        except httpx2.TransportError:
            if last:
                raise
            sleep(backoff(attempt))
            continue
        if last or response.status_code not in RETRY_STATUS:
            return response
        response.close()
        sleep(retry_after(response) or backoff(attempt))
    raise AssertionError("tries must be at least 1")
