"""Run many jobs under seeded faults, then check every invariant.

    scripts/nemesis --stack production --jobs 200 --workers 4 --faults 60
    scripts/nemesis --stack embedded --jobs 60 --faults 30

Prints a Markdown table and exits with 1 where anything was violated.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import sqlalchemy as sa
from faults import EMBEDDED, PRODUCTION
from invariants import check
from stack import EmbeddedStack, ProductionStack, make_model, request, spec_json

from bitmill_workers.store.db import Database
from bitmill_workers.store.jobs import JobStore
from bitmill_workers.store.tables import job_events, jobs


@dataclass
class Report:
    """What was done, and what was violated."""

    stack: str
    seed: int
    jobs: int
    seconds: float
    faults: Counter[str]
    states: dict[str, int]
    counts: dict[str, int]
    submit_p99_ms: float
    violations: dict[str, list[str]] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """True where nothing was violated."""
        return not any(self.violations.values())


class Submitter(threading.Thread):
    """Submits jobs evenly over a time, each under a key, repeating until it was accepted."""

    def __init__(
        self, stack: ProductionStack | EmbeddedStack, count: int, over_s: float, dice: random.Random
    ) -> None:
        super().__init__(daemon=True)
        self._stack, self._count, self._over, self._dice = stack, count, over_s, dice
        self.accepted: dict[str, str] = {}
        self.latencies: list[float] = []

    def run(self) -> None:
        """Submit until all are accepted."""
        for number in range(self._count):
            label = f"steps={self._dice.randint(2, 6)} sleep={self._dice.uniform(0.05, 0.3):.2f}"
            self._submit(f"key-{number}", label)
            time.sleep(self._over / self._count * self._dice.random())

    def _submit(self, key: str, label: str) -> None:
        while True:
            began = time.monotonic()
            try:
                answer = request(
                    self._stack,
                    "POST",
                    "/v1/jobs",
                    json=spec_json(label),
                    headers={"Idempotency-Key": key},
                )
                if answer.status_code == 202:
                    self.accepted[key] = answer.json()["id"]
                    self.latencies.append(time.monotonic() - began)
                    return
                assert answer.status_code >= 429, answer.text
            except (httpx2.HTTPError, AssertionError) as error:
                if isinstance(error, AssertionError) and "waited" not in str(error):
                    raise
            time.sleep(0.3)


def run(kind: str, folder: Path, *, seed: int, count: int, workers: int, faults: int) -> Report:
    """One run: start the stack, submit and hurt, wait for every end, check."""
    dice = random.Random(seed)
    make_model(folder / "models" / "tiny")
    production = kind == "production"
    stack = ProductionStack(folder, workers=workers) if production else EmbeddedStack(folder)
    began = time.monotonic()
    stack.start()
    try:
        submitter = Submitter(stack, count, faults * 3.0, random.Random(seed + 1))
        submitter.start()
        injected = _hurt(stack, PRODUCTION if production else EMBEDDED, faults, dice)
        _settle(stack, submitter)
        found = check(stack, stack.direct, submitter.accepted)
        states, counts = _summary(stack)
        slowest = sorted(submitter.latencies)[int(0.99 * (len(submitter.latencies) - 1))]
        report = Report(
            kind,
            seed,
            sum(states.values()),
            time.monotonic() - began,
            injected,
            states,
            counts,
            slowest * 1000,
            found,
        )
    finally:
        stack.stop()
    orphans = [str(pid) for pid in _processes_in(folder)]
    report.violations["I8 processes after the end"] = orphans
    return report


def _hurt(
    stack: ProductionStack | EmbeddedStack,
    kinds: tuple,
    count: int,
    dice: random.Random,
) -> Counter[str]:
    """Inject `count` faults, every kind at least once where the count allows."""
    injected: Counter[str] = Counter()
    order = [*dice.sample(kinds, len(kinds))]
    while injected.total() < count:
        fault = order.pop() if order else dice.choice(kinds)
        time.sleep(dice.uniform(0.5, 2.5))
        stack.keep()
        if fault(stack, dice):
            injected[fault.__name__] += 1
    return injected


def _settle(stack: ProductionStack | EmbeddedStack, submitter: Submitter) -> None:
    """No more faults: wait until every job has ended and garbage was collected."""
    deadline = time.monotonic() + 900
    database = Database(stack.direct.database)
    store = JobStore(database)
    calm = 0.0
    while time.monotonic() < deadline:
        stack.keep()
        time.sleep(0.5)
        left = set(store.counts()) - {"succeeded", "failed", "cancelled"}
        folders = list((stack.settings.data / "jobs").glob("*"))
        if submitter.is_alive() or left or folders:
            calm = 0.0
        calm = calm or time.monotonic()
        if not (submitter.is_alive() or left or folders) and time.monotonic() - calm > 3:
            break
    time.sleep(2 * (stack.settings.collect_s + stack.settings.reconcile_s))
    database.close()


def _summary(stack: ProductionStack | EmbeddedStack) -> tuple[dict[str, int], dict[str, int]]:
    database = Database(stack.direct.database)
    states = {str(k): v for k, v in JobStore(database).counts().items()}
    with database.read() as conn:
        fenced = sa.select(sa.func.count()).where(job_events.c.kind == "fenced")
        total = sa.select(
            *(
                sa.func.sum(jobs.c[name])
                for name in ("attempt", "lost_count", "crash_count", "handback_count")
            )
        )
        attempts, lost, crashes, handed = conn.execute(total).one()
        refused = conn.execute(fenced).scalar_one()
    database.close()
    return states, {
        "attempts": int(attempts),
        "leases lost": int(lost),
        "runner crashes": int(crashes),
        "handed back": int(handed),
        "stale writes refused": refused,
    }


def _processes_in(folder: Path) -> list[int]:
    from stores import processes_of

    return processes_of(str(folder / "data"))


def table(report: Report) -> str:
    """The report as Markdown."""
    rows = [
        ("stack, seed", f"{report.stack}, {report.seed}"),
        ("jobs accepted", str(report.jobs)),
        ("faults injected", f"{report.faults.total()} of {len(report.faults)} kinds"),
        ("time", f"{report.seconds:.0f} s"),
        ("ended as", ", ".join(f"{v} {k}" for k, v in sorted(report.states.items()))),
        *((name, str(value)) for name, value in report.counts.items()),
        ("POST /v1/jobs p99 under faults", f"{report.submit_p99_ms:.0f} ms"),
        *((name, str(len(found))) for name, found in report.violations.items()),
    ]
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    details = [f"- {n}: {item}" for n, found in report.violations.items() for item in found[:5]]
    kinds = ", ".join(f"{k} {v}" for k, v in sorted(report.faults.items()))
    return "\n".join([*lines, "", f"Faults: {kinds}.", *details])


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stack", choices=["production", "embedded"], default="production")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--keep", action="store_true", help="keep logs and data")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="nemesis-"))
    report = run(
        options.stack,
        folder,
        seed=options.seed,
        count=options.jobs,
        workers=options.workers,
        faults=options.faults,
    )
    if not options.keep:
        shutil.rmtree(folder)
    sys.stdout.write(table(report) + "\n")
    return 0 if report.clean else 1


if __name__ == "__main__":
    sys.exit(main())
