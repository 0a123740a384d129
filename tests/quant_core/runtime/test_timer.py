"""Stages of a recorder: exclusive seconds that add up, and nothing without a recorder."""

from __future__ import annotations

import pytest
import torch

from bitmill.runtime import timer as timing
from bitmill.runtime.timer import Recorder, timed

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the recorder's clock shows; a test sets them."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return now


def test_seconds_are_exclusive_and_add_up(clock: list[float]) -> None:
    with Recorder(CPU) as recorder:
        clock[0] = 1
        with timed("outer"):
            clock[0] = 3
            with timed("inner"):
                clock[0] = 7
            clock[0] = 15
        clock[0] = 31
        assert recorder.take() == {"other": 17, "outer": 10, "inner": 4}
        assert sum(recorder.take().values()) == 0


def test_an_error_ends_its_part(clock: list[float]) -> None:
    with Recorder(CPU) as recorder:
        with pytest.raises(ValueError, match="no"), timed("broken"):
            clock[0] = 2
            raise ValueError("no")
        clock[0] = 5
        assert recorder.take() == {"other": 3, "broken": 2}


def test_a_second_recorder_is_refused_and_parts_without_one_cost_nothing() -> None:
    with Recorder(CPU), pytest.raises(RuntimeError, match="open already"), Recorder(CPU):
        pass
    with timed("unwatched"):
        pass
