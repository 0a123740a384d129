"""Estimates of a job's end."""

from __future__ import annotations

from random import Random

import pytest

from bitmill_workers.execution.eta import Eta
from bitmill_workers.store.db import Database
from bitmill_workers.store.jobs import JobStore
from bitmill_workers.store.leases import LeaseStore
from stores import spec


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_steady_pace_is_continued_over_the_stages_to_come() -> None:
    clock = Clock()
    eta = Eta({"profile": 10.0, "refine": 60.0, "evaluate": 30.0}, clock)
    for done in range(1, 6):
        clock.now = 2.0 * done * 6
        left = eta.remaining("refine", done, 10)
        assert (left is None) == (done <= 3)
    # 40 of 100 shares done, 24 gained in 48 s: 60 more take 120 s.
    assert left is not None
    assert left.seconds == pytest.approx(120.0)


def test_resumed_attempt_counts_its_own_pace_only() -> None:
    clock = Clock()
    eta = Eta({"refine": 50.0, "evaluate": 50.0}, clock)
    for done in (9, 9, 9, 10):
        clock.now += 5.0
        left = eta.remaining("refine", done, 10)
    # 5 shares of 100 took 15 s, so the 50 of the evaluation take 150 s.
    assert left is not None
    assert left.seconds == pytest.approx(150.0)


def test_nine_ends_of_ten_lie_in_the_range() -> None:
    random = Random(0)
    usual = {"resolve": 5.0, "profile": 60.0, "refine": 100.0, "pack": 10.0, "evaluate": 40.0}
    within = []
    for _ in range(100):
        clock, told, speed = Clock(), [], random.uniform(0.2, 5)
        eta = Eta(usual, clock)
        for stage, seconds in usual.items():
            real = seconds * speed * random.lognormvariate(0, 0.3)
            for done in range(1, 31):
                clock.now += real / 30
                told.append((clock.now, eta.remaining(stage, done, 30)))
        for when, left in told:
            if left is not None and left.seconds > 0:
                within.append(left.least <= clock.now - when <= left.most)
                assert left.most < 10 * left.least
    assert sum(within) / len(within) > 0.9


def test_no_guess_without_earlier_jobs_or_for_unknown_stages() -> None:
    clock = Clock()
    for stages, stage in (({}, "refine"), ({"refine": 1.0}, "upload")):
        eta = Eta(stages, clock)
        for done in range(9):
            clock.now += 1
            assert eta.remaining(stage, done, 10) is None


def test_report_shows_the_end_by_the_clock_of_the_database(
    store: JobStore, leases: LeaseStore, database: Database
) -> None:
    job = store.submit(spec()).job
    claimed = leases.claim_next("w", ("cpu",))
    assert claimed is not None
    assert leases.report(job.id, claimed.token, [], remaining_s=100.0)
    shown = store.get(job.id).estimated_finish
    assert shown is not None
    assert shown - database.now() == pytest.approx(100, abs=5)
