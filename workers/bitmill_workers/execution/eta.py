"""When a job will be finished: the shares of its stages in earlier jobs, and its own pace.

With s_i the mean time of stage i over earlier jobs, done = (sum of s_i of the finished stages +
s_now * units done / units) / sum of all s_i. Remaining time = (1 - done) / pace, where pace is how
much of `done` was gained per second since this attempt's first report, so stages that a resumed
attempt skipped do not count. Given up: no guess before any job has succeeded on this service.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from bitmill.pipeline.progress import STAGES

_MIN_UNITS = 3
_MIN_GAIN = 0.01


class Eta:
    """Follows one attempt; `stage_s` maps stages to their mean seconds in earlier jobs."""

    def __init__(
        self, stage_s: Mapping[str, float], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stage_s = {stage: max(0.0, stage_s.get(stage, 0.0)) for stage in STAGES}
        self._clock = clock
        self._first: tuple[float, float] | None = None
        self._units = 0

    def remaining(self, stage: str, done: int, total: int) -> float | None:
        """Seconds until the job's end after `done` of `total` units of `stage`, if there is ground.

        That is: earlier jobs, three units of this attempt, and one percent of the way.
        """
        whole = sum(self._stage_s.values())
        if stage not in self._stage_s or whole <= 0 or total <= 0:
            return None
        before = sum(self._stage_s[s] for s in STAGES[: STAGES.index(stage)])
        at = (before + self._stage_s[stage] * min(1.0, done / total)) / whole
        now = self._clock()
        if self._first is None:
            self._first = (now, at)
        self._units += 1
        gained, spent = at - self._first[1], now - self._first[0]
        if self._units <= _MIN_UNITS or gained < _MIN_GAIN or spent <= 0:
            return None
        return (1.0 - at) * spent / gained
