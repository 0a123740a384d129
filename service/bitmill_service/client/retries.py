"""When the client tries again: one rule for every request.

Wait before try k: min(8, 0.25 * 2^k) seconds times a random factor in [0.5, 1], or what the
server's `Retry-After` asks for, never less. A single call that is asked to wait for more than 30 s
gives up instead. Tried again: connection errors, timeouts and the
statuses 429, 502, 503 and 504; every request the client makes is safe to repeat, because
creations carry an Idempotency-Key. A single call gives up after a number of tries; what follows a
job or brings its files goes on until nothing has come for `patience` seconds, so that a restart of
the service does not end it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx2

RETRY_STATUS = frozenset({429, 502, 503, 504})
_LONGEST = 30.0
_QUIET = 2.0


@dataclass(frozen=True)
class Retries:
    """How a client waits. patience: seconds. on_wait: told, in words, what is waited for."""

    tries: int = 6
    patience: float = 600.0
    sleep: Callable[[float], None] = time.sleep
    on_wait: Callable[[str], None] = lambda message: None


class Waiting:
    """The pauses between the tries of one thing.

    patience: None counts tries instead.
    """

    def __init__(self, retries: Retries, patience: float | None) -> None:
        self._retries, self._patience = retries, patience
        self.news()

    def news(self) -> None:
        """Something has come: patience starts over."""
        self._attempt, self._slept, self._since = 0, 0.0, time.monotonic()
        self._told = False

    def pause(self, fault: str, asked: float | None = None) -> bool:
        """Sleep before the next try; False where there is none."""
        pause = asked or backoff(self._attempt)
        if pause > (_LONGEST if self._patience is None else self._patience):
            return False
        self._attempt += 1
        self._slept += pause
        spent = max(self._slept, time.monotonic() - self._since)
        if self._patience is None:
            if self._attempt >= self._retries.tries:
                return False
        elif spent > self._patience:
            return False
        elif spent > _QUIET and not self._told:
            self._told = True
            left = max(1, round((self._patience - spent) / 60))
            self._retries.on_wait(f"{fault}; trying again for {left} min")
        self._retries.sleep(pause)
        return True


def retry_after(response: httpx2.Response) -> float | None:
    """Seconds of a numeric `Retry-After`."""
    value = response.headers.get("retry-after", "")
    return float(value) if value.isdecimal() else None


def backoff(attempt: int) -> float:
    """Seconds to wait before try `attempt` + 1."""
    return min(8.0, 0.25 * 2.0 ** min(attempt, 9)) * random.uniform(0.5, 1.0)


def with_retries(
    send: Callable[[], httpx2.Response], retries: Retries, *, patience: float | None = None
) -> httpx2.Response:
    """Call `send` until it gives an answer that is final, or the last try.

    Raises `httpx2.TransportError` where the last try got no answer at all.
    """
    waiting = Waiting(retries, patience)
    while True:
        try:
            response = send()
        except httpx2.TransportError as error:
            if not waiting.pause(f"no answer ({error})"):
                raise
            continue
        if response.status_code not in RETRY_STATUS:
            return response
        response.close()
        if not waiting.pause(f"the service answers {response.status_code}", retry_after(response)):
            return response
