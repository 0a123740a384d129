"""What a child says, in a real job's events and log."""

from __future__ import annotations

import re

from bitmill_workers.execution.eta import Eta
from bitmill_workers.execution.progress_relay import Reporter
from bitmill_workers.store.jobs import JobStore
from bitmill_workers.store.leases import LeaseStore
from stores import claim, spec

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (.*)")


def log_of(store: JobStore, leases: LeaseStore, *said: bytes | dict[str, object]) -> list[str]:
    """The lines of the log of a job that says this, and succeeds."""
    job = claim(leases, store.submit(spec()).job.id)
    reporter = Reporter(leases, job, Eta({}), log_limit=4096)
    for one in said:
        if isinstance(one, bytes):
            reporter.log(one)
        else:
            reporter.message(one)
        assert reporter.flush()
    assert leases.finalize(job.id, job.token)
    assert leases.finish(job.id, job.token, {}, [])
    lines = store.read_log(job.id).data.decode().splitlines()
    return [found[1] if (found := LINE.fullmatch(line)) else line for line in lines]


def test_a_job_that_met_no_trouble_has_a_log(store: JobStore, leases: LeaseStore) -> None:
    assert log_of(
        store,
        leases,
        {"kind": "stage", "stage": "resolve", "state": "started", "message": "downloading a/b"},
        {"kind": "progress", "stage": "resolve", "done": 1, "total": 2},
        {"kind": "stage", "stage": "resolve", "state": "finished"},
        {"kind": "warning", "stage": "plan", "message": "windows are short"},
        {"kind": "stage", "stage": "profile", "state": "skipped"},
    ) == [
        "resolve started: downloading a/b",
        "resolve finished",
        "plan warning: windows are short",
        "profile skipped",
    ]


def test_what_the_runner_prints_keeps_its_lines(store: JobStore, leases: LeaseStore) -> None:
    started = {"kind": "stage", "stage": "refine", "state": "started"}
    assert log_of(store, leases, b"one\ntw", started, b"three", b" four\n", started) == [
        "one",
        "tw",
        "refine started",
        "three four",
        "refine started",
    ]


def test_the_log_is_capped(store: JobStore, leases: LeaseStore) -> None:
    started = {"kind": "stage", "stage": "refine", "state": "started"}
    assert sum(map(len, log_of(store, leases, *[started] * 500))) <= 4096
