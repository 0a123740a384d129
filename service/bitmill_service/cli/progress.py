"""Shows a running job: bars on a terminal, plain lines otherwise.

One bar per stage; plain lines come once per stage change, at most every two seconds in between and
at the end of a stage, so that a log stays readable. Both tell how fast units are done and how long
the rest of the stage will take at that pace, once two have been done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from bitmill_service.schemas import EventView

_PLAIN_INTERVAL = 2.0


@dataclass
class Pace:
    """How fast a stage goes: from the first count that was seen of it. Times in seconds."""

    total: int
    first: int
    began: float
    done: int
    last: float

    def told(self) -> str:
        """Rate and time left in words; empty until it is known, and at the end."""
        passed, made = self.last - self.began, self.done - self.first
        if made < 2 or passed <= 0 or self.done >= self.total:
            return ""
        rate = made / passed
        each = f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"
        return f"{each}, {duration((self.total - self.done) / rate)} left"


def duration(seconds: float) -> str:
    """A time to the second under two minutes, else to the minute."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


class JobWatch:
    """Feed it what a job tells, with `show` or `on_event`; use it as a context manager."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._paces: dict[str, Pace] = {}
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._stage: str | None = None
        self._last_line = 0.0
        if console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description:<9}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[pace]}"),
                console=console,
            )

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def on_event(self, event: EventView) -> None:
        """Show an event of the service."""
        self.show(event.kind, event.data)

    def show(self, kind: str, data: Mapping[str, Any]) -> None:
        """Show one event; kinds it does not know are left out."""
        stage = data.get("stage")
        if kind == "state":
            self._line(f"job {data.get('state', '')}{_reason(data)}")
        elif kind == "warning":
            self._line(f"warning: {data.get('message', '')}")
        elif kind == "stage" and isinstance(stage, str):
            self._on_stage(stage, str(data.get("state")))
        elif kind == "progress" and isinstance(stage, str):
            self._on_progress(
                stage, int(data["done"]), int(data["total"]), str(data.get("unit") or "")
            )

    def _on_stage(self, stage: str, state: str) -> None:
        if state == "started":
            self._paces.pop(stage, None)
        if self._bars is None:
            self._line(f"{stage}: {state}")
            return
        task = self._task(stage, total=1)
        if state in ("finished", "skipped"):
            total = self._bars.tasks[self._bars.task_ids.index(task)].total or 1
            self._bars.update(task, completed=total, pace="")
            self._bars.stop_task(task)
            if state == "skipped":
                self._bars.update(task, unit="(done before)")

    def _on_progress(self, stage: str, done: int, total: int, unit: str) -> None:
        pace = self._pace(stage, done, total)
        if self._bars is not None:
            task = self._task(stage, total=total)
            self._bars.update(task, completed=done, total=total, unit=unit, pace=pace)
            return
        now = self._clock()
        if stage != self._stage or done == total or now - self._last_line >= _PLAIN_INTERVAL:
            self._stage, self._last_line = stage, now
            told = f"{stage}: {done}/{total} {unit}".rstrip()
            self._line(f"{told}, {pace}" if pace else told)

    def _pace(self, stage: str, done: int, total: int) -> str:
        now, known = self._clock(), self._paces.get(stage)
        if known is None or known.total != total or done < known.done:
            self._paces[stage] = Pace(total, done, now, done, now)
            return ""
        if done > known.done:
            known.done, known.last = done, now
        return known.told()

    def _task(self, stage: str, *, total: int) -> TaskID:
        assert self._bars is not None
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total, unit="", pace="")
        return self._tasks[stage]

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)


def _reason(data: Mapping[str, Any]) -> str:
    for key in ("message", "reason"):
        if data.get(key):
            return f": {data[key]}"
    return ""
