"""Limits of processor time that hold on slow and busy machines too."""

from __future__ import annotations

import time

_LOOP_S = 0.03
"""What `_loop` takes on a processor of 2020 with nothing else to do, seconds."""


def limit(seconds: float) -> float:
    """So many seconds of such a processor, in seconds of this one as it is now."""
    started = time.process_time()
    _loop()
    return seconds * max(1.0, (time.process_time() - started) / _LOOP_S)


def _loop() -> None:
    total = 0
    for number in range(400_000):
        total += number
