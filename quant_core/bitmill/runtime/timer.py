"""Seconds of named parts, for benchmarks: nothing is measured unless a `Recorder` is open.

    with Recorder(device) as recorder:
        ...                            # library code with `with timed("hessian"):` around parts
    recorder.take()                    # {"hessian": 1.2, ..., "other": 0.3}

Seconds are exclusive: a part's time without the parts inside it; "other" is what no part covers, so
all of them add up to the time since the last `take`. On CUDA the clock is the current stream's
(events, nothing waits): a part ends when the stream gets past what it launched, and what the stream
had to wait for counts for the part that made it wait.

One recorder at a time in a process; what a thread does beside the main one (loading ahead) is not
to be marked.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import torch

OTHER = "other"

Mark = float | torch.cuda.Event


class Recorder:
    """Collects the marks of `timed` while it is open, on the clock of `device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stack = [OTHER]
        self._spans: list[tuple[str, Mark, Mark]] = []
        self._last = self._mark()

    def __enter__(self) -> Self:
        global _active
        if _active is not None:
            raise RuntimeError("a recorder is open already: close it first")
        _active = self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _active
        _active = None

    def push(self, name: str) -> None:
        """Begin a part inside the present one."""
        self._close_span()
        self._stack.append(name)

    def pop(self) -> None:
        """End the innermost part."""
        self._close_span()
        self._stack.pop()

    def take(self) -> dict[str, float]:
        """Seconds by part since the last call, largest first; waits for the device."""
        self._close_span()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds: dict[str, float] = {}
        for name, begin, end in self._spans:
            seconds[name] = seconds.get(name, 0.0) + _between(begin, end)
        self._spans.clear()
        return dict(sorted(seconds.items(), key=lambda item: -item[1]))

    def _close_span(self) -> None:
        now = self._mark()
        self._spans.append((self._stack[-1], self._last, now))
        self._last = now

    def _mark(self) -> Mark:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


_active: Recorder | None = None


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Counts what runs inside for the part `name` of the open recorder, if there is one."""
    recorder = _active
    if recorder is None:
        yield
        return
    recorder.push(name)
    try:
        yield
    finally:
        recorder.pop()


def _between(begin: Mark, end: Mark) -> float:
    if isinstance(begin, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        return float(begin.elapsed_time(end)) / 1e3
    assert not isinstance(end, torch.cuda.Event)
    return end - begin
