"""How far an evaluation is: one count over all that it does, which never goes back."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from bitmill.runtime.ranks import SINGLE, Ranks

OnUnit = Callable[[int, int, str, str], None]
"""Told units done, their total, what they are and what is under way."""


class Count:
    """`total` units of an evaluation, done part by part.

    unit: what they are, "window" where models read windows and nothing else is done, else "step": a
    window that a model has read, a block of a baseline that was quantized, a task of a model.
    """

    def __init__(self, on_unit: OnUnit, total: int, unit: str = "window") -> None:
        self._on_unit, self._total, self._unit = on_unit, total, unit
        self._given = 0

    def part(self, units: int, message: str) -> Callable[[int, int], None]:
        """The next so many units; told how many of how many equal steps of them are done."""
        before = self._given
        self._given += units

        def passed(done: int, steps: int) -> None:
            self._on_unit(before + units * done // steps, self._total, self._unit, message)

        return passed


def windows_read(texts: Mapping[str, Tensor], models: int, group: Ranks = SINGLE) -> int:
    """Windows that this rank's models read. texts: int64 [S, T] by name, of all ranks."""
    return models * sum(len(group.shard(windows)) for windows in texts.values())
