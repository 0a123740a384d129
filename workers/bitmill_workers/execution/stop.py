"""Being asked to stop: signals become a flag and a readable descriptor, never an exception.

Celery ends a pool process by raising SystemExit at whatever instruction it is; within a database
commit that leaves the outcome unknown. While a job is supervised its signals are taken over.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any, Self

_SIGNALS = (signal.SIGTERM, signal.SIGQUIT, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """Context manager for the main thread; `requested` turns True at the first signal."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        os.set_blocking(self._reader, False)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._reader)
        os.close(self._writer)

    @property
    def fd(self) -> int:
        """Readable once a signal has come."""
        return self._reader

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True
