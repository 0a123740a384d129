"""When a job will be finished: the shares of its stages in earlier jobs, and its own pace.

With s_i the mean time of stage i over earlier jobs, done = (sum of s_i of the finished stages +
s_now * units done / units) / sum of all s_i. Remaining time = (1 - done) / pace, where pace is how
much of `done` was gained per second since this attempt's first report, so stages that a resumed
attempt skipped do not count. Given up: no guess before any job has succeeded on this service.

The range goes from the faster of that pace and the pace of the later half of what was gained, to
the slower one, each `_MARGIN` times further. Where every stage takes 30 % more or less than in
earlier jobs (one standard deviation), nine ends of ten lie within (`tests/workers/test_eta.py`).
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from bitmill.pipeline.progress import STAGES

_MIN_UNITS = 3
_MIN_GAIN = 0.01
_MARGIN = 1.6


class Remaining(NamedTuple):
    """Seconds until a job's end: the guess, and the range that it lies in."""

    seconds: float
    least: float
    most: float


class Eta:
    """Follows one attempt; `stage_s` maps stages to their mean seconds in earlier jobs."""

    def __init__(
        self, stage_s: Mapping[str, float], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stage_s = {stage: max(0.0, stage_s.get(stage, 0.0)) for stage in STAGES}
        self._clock = clock
        self._ways: list[tuple[float, float]] = []  # share done, when

    def remaining(self, stage: str, done: int, total: int) -> Remaining | None:
        """Time until the job's end after `done` of `total` units of `stage`, if there is ground.

        That is: earlier jobs, three units of this attempt, and one percent of the way.
        """
        whole = sum(self._stage_s.values())
        if stage not in self._stage_s or whole <= 0 or total <= 0:
            return None
        before = sum(self._stage_s[s] for s in STAGES[: STAGES.index(stage)])
        at = (before + self._stage_s[stage] * min(1.0, done / total)) / whole
        now = self._clock()
        self._ways.append((at, now))
        start, began = self._ways[0]
        gained, spent = at - start, now - began
        if len(self._ways) <= _MIN_UNITS or gained < _MIN_GAIN or spent <= 0:
            return None
        later = bisect.bisect_right(self._ways, (start + gained / 2, now)) - 1
        half, when = self._ways[later]
        each = sorted((spent / gained, (now - when) / (at - half)))
        left = 1.0 - at
        return Remaining(left * spent / gained, left * each[0] / _MARGIN, left * each[1] * _MARGIN)
