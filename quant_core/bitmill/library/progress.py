"""How a caller watches a call: by a function, or by bars.

Bars are shown where somebody looks: standard error is a terminal, or the caller is a notebook.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from bitmill.pipeline.progress import Progress

Watcher = Callable[[Progress], None]


@contextmanager
def watching(progress: Watcher | bool | None) -> Iterator[Watcher]:
    """What is told of everything that happens within.

    progress: a function of `Progress`, whose exceptions end the work; True for bars, False for
    nothing, None for bars where somebody looks.
    """
    if callable(progress):
        yield progress
    elif progress or (progress is None and (in_notebook() or sys.stderr.isatty())):
        bars = _Bars()
        try:
            yield bars.show
        finally:
            bars.close()
    else:
        yield lambda _: None


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this process."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return "IPKernelApp" in getattr(shell, "config", ())


class _Bars:
    """One bar for each stage with something to count."""

    def __init__(self) -> None:
        from tqdm.auto import tqdm

        class Bar(tqdm):  # type: ignore[misc, unused-ignore]
            """Without the thread that watches all bars of a process, and stays."""

            monitor_interval = 0

        self._new: Callable[..., Any] = Bar
        self._bar: Any = None

    def show(self, event: Progress) -> None:
        """Show one event."""
        if event.kind == "warning":
            self._new.write(f"warning: {event.message}", file=sys.stderr)  # type: ignore[attr-defined]
        elif event.kind == "stage":
            self.close()
        else:
            if self._bar is None:
                self._bar = self._new(desc=event.stage, unit=event.unit, disable=False)
            self._bar.total = event.total
            self._bar.set_postfix_str(event.message or "", refresh=False)
            self._bar.update((event.done or 0) - self._bar.n)
            self._bar.refresh()

    def close(self) -> None:
        """Leave the bar that is shown as it is."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
