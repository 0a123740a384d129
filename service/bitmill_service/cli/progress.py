"""Shows a running job: bars on a terminal, plain lines otherwise.

One bar per stage; plain lines come once per stage change, at most every two seconds in between and
at the end of a stage, so that a log stays readable.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
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


class JobWatch:
    """Feed it what a job tells, with `show` or `on_event`; use it as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
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
        if self._bars is None:
            self._line(f"{stage}: {state}")
            return
        task = self._task(stage, total=1)
        if state in ("finished", "skipped"):
            total = self._bars.tasks[self._bars.task_ids.index(task)].total or 1
            self._bars.update(task, completed=total)
            self._bars.stop_task(task)
            if state == "skipped":
                self._bars.update(task, unit="(done before)")

    def _on_progress(self, stage: str, done: int, total: int, unit: str) -> None:
        if self._bars is not None:
            task = self._task(stage, total=total)
            self._bars.update(task, completed=done, total=total, unit=unit)
            return
        now = time.monotonic()
        if stage != self._stage or done == total or now - self._last_line >= _PLAIN_INTERVAL:
            self._stage, self._last_line = stage, now
            self._line(f"{stage}: {done}/{total} {unit}".rstrip())

    def _task(self, stage: str, *, total: int) -> TaskID:
        assert self._bars is not None
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total, unit="")
        return self._tasks[stage]

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)


def _reason(data: Mapping[str, Any]) -> str:
    for key in ("message", "reason"):
        if data.get(key):
            return f": {data[key]}"
    return ""
