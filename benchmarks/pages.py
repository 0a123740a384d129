"""What the web pages cost the service: the list of many jobs, and pages that somebody left open.

    python benchmarks/pages.py OUT [--jobs 10000] [--idle 60] [--settle 30]

Starts a service without a worker on a folder of its own, on SQLite, fills it with jobs (a tenth of
them waiting), and writes OUT.md. Seconds are those of one client on loopback, one call after
another; CPU is what the server's process used, by the system's count. "idle" is the CPU of an open
page of Chromium that shows something unfinished in which nothing happens, less what the server uses
without any page.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import psutil
import sqlalchemy as sa
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

from bitmill_workers.job_spec import parse_spec
from bitmill_workers.store.db import Database
from bitmill_workers.store.jobs import JobStore
from bitmill_workers.store.migrate import upgrade
from bitmill_workers.store.records import new_id
from bitmill_workers.store.tables import jobs

CALLS = 50
SPEC = {
    "model": {"source": "path", "path": "models/some-model-7b"},
    "budget": {"bits": 3},
    "label": "a job of many",
}


@contextmanager
def served(data: Path) -> Iterator[tuple[str, psutil.Process]]:
    """A service without a worker: its address and process."""
    command = [sys.executable, "-P", "-m", "bitmill_service.cli.main", "serve", "--no-worker"]
    process = subprocess.Popen(
        [*command, "--data", str(data), "--port", "0", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        text = ""
        while not text.endswith("}\n"):
            text += process.stdout.readline()
        yield json.loads(text)["url"], psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)


def fill(data: Path, count: int) -> str:
    """Store `count` jobs and return the id of one that waits."""
    database = Database(f"sqlite:///{data / 'bitmill.db'}")
    upgrade(database)
    job = JobStore(database).submit(parse_spec(SPEC)).job
    with database.write() as conn:
        row = dict(conn.execute(sa.select(jobs).where(jobs.c.id == job.id)).one()._mapping)
        rows = []
        for number in range(count - 1):
            ended = {} if number % 10 == 0 else {"state": "succeeded", "finished_at": time.time()}
            rows.append(row | ended | {"id": new_id(), "fair_rank": number})
        conn.execute(sa.insert(jobs), rows)
    database.close()
    return job.id


def cpu(server: psutil.Process) -> float:
    """CPU seconds of a process so far."""
    used = server.cpu_times()
    return float(used.user + used.system)


def calls(http: httpx2.Client, server: psutil.Process, path: str) -> str:
    """A row of the table: a page asked for again and again."""
    http.get(path).raise_for_status()
    begun, seconds = cpu(server), []
    for _ in range(CALLS):
        started = time.perf_counter()
        answer = http.get(path).raise_for_status()
        seconds.append(time.perf_counter() - started)
    each = (cpu(server) - begun) / CALLS
    p20, *_, p80 = statistics.quantiles(seconds, n=5)
    shown = (p20, statistics.median(seconds), p80, max(seconds))
    times = " | ".join(f"{1000 * value:.0f}" for value in shown)
    return f"| `{path}` | {times} | {1000 * each:.1f} | {len(answer.content) / 1000:.0f} |"


@contextmanager
def open_page(address: str) -> Iterator[None]:
    """Chromium without a screen, showing a page."""
    options = Options()
    for switch in ("headless=new", "no-sandbox", "disable-dev-shm-usage"):
        options.add_argument(f"--{switch}")
    options.binary_location = "/usr/bin/chromium"
    driver = webdriver.Chrome(options, Service("/usr/bin/chromedriver"))
    try:
        driver.get(address)
        yield
    finally:
        driver.quit()


def share(server: psutil.Process, seconds: float) -> float:
    """Percent of a core that the server uses in the next `seconds`."""
    begun, started = cpu(server), time.perf_counter()
    time.sleep(seconds)
    return 100 * (cpu(server) - begun) / (time.perf_counter() - started)


@contextmanager
def filled(count: int) -> Iterator[tuple[str, psutil.Process, str]]:
    """A service with so many jobs: address, process, id of one that waits."""
    with tempfile.TemporaryDirectory() as scratch:
        waiting = fill(Path(scratch), count)
        with served(Path(scratch)) as (url, server):
            yield url, server, waiting


def lists(count: int) -> list[str]:
    """Rows of pages among `count` jobs."""
    with filled(count) as (url, server, waiting), httpx2.Client(base_url=url, timeout=60) as http:
        paths = (
            *("/ui/jobs", "/ui/jobs?state=queued", "/ui/jobs?state=running"),
            *(
                "/ui/jobs?label=absent",
                "/ui/jobs?model=absent&label=of%20man",
                f"/ui/jobs/{waiting}",
                "/v1/jobs?limit=50",
            ),
        )
        return [calls(http, server, path).replace(waiting, "{job_id}") for path in paths]


def idle_pages(seconds: float, settle: float) -> list[tuple[str, float]]:
    """Percent of a core for no page and for pages that are open, of 50 jobs, five waiting.

    A page is looked at `settle` seconds after it was opened.
    """
    with filled(50) as (url, server, waiting):
        time.sleep(30)
        found = [("none: the server by itself", share(server, seconds))]
        for path in ("/ui/jobs", f"/ui/jobs/{waiting}"):
            with open_page(url + path):
                time.sleep(settle)
                more = share(server, seconds) - found[0][1]
            found.append((f"`{path.replace(waiting, '{job_id}')}`, more than that", more))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--idle", type=float, default=60)
    parser.add_argument("--settle", type=float, default=30, help="seconds a page is open before")
    args = parser.parse_args()
    rows = lists(args.jobs)
    idle = idle_pages(args.idle, args.settle)
    lines = [
        f"{args.jobs:,} jobs, a tenth of them waiting, SQLite, Python "
        f"{platform.python_version()}, {psutil.cpu_count()} cores, load average "
        f"{psutil.getloadavg()[1]:.1f} of five minutes.",
        "",
        f"| page, {CALLS} calls | p20 ms | p50 | p80 | max | CPU ms | kB |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        f"| open page, {args.idle:g} s from {args.settle:g} s on, nothing happens | % of a core |",
        "|---|---|",
        *(f"| {page} | {used:.2f} |" for page, used in idle),
    ]
    args.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print(args.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
