"""A real Celery worker process on the file transport, and what happens when it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from bitmill_workers.messaging.app import Dispatcher
from bitmill_workers.messaging.reconcile import Reconciler
from bitmill_workers.settings import Settings
from bitmill_workers.store.catalog import Catalog
from bitmill_workers.store.db import Database
from bitmill_workers.store.jobs import JobStore
from bitmill_workers.store.records import JobRecord
from stores import alive, processes_of, spec, start_worker, wait_for

Start = Callable[[], "subprocess.Popen[bytes]"]


@pytest.fixture
def start(settings: Settings, database: Database, tmp_path: Path) -> Iterator[Start]:
    """Starts workers on the test's data folder; whatever is left of them is killed at the end."""
    started: list[subprocess.Popen[bytes]] = []

    def run() -> subprocess.Popen[bytes]:
        started.append(start_worker(settings, tmp_path / "worker.log"))
        return started[-1]

    yield run
    for worker in started:
        with suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()


@pytest.fixture
def dispatcher(settings: Settings, store: JobStore) -> Iterator[Dispatcher]:
    sender = Dispatcher(settings, store.mark_sent)
    yield sender
    sender.close()


@pytest.fixture
def reconciler(
    settings: Settings, database: Database, dispatcher: Dispatcher
) -> Iterator[Reconciler]:
    loop = Reconciler(settings.model_copy(update={"reconcile_s": 0.2}), database, dispatcher)
    loop.start()
    yield loop
    loop.stop()


def wait_state(store: JobStore, job: JobRecord, *states: str, timeout: float = 30) -> JobRecord:
    wait_for(lambda: store.get(job.id).state in states, f"job state {states}", timeout)
    return store.get(job.id)


def step(settings: Settings, job: JobRecord, number: int) -> None:
    mark = settings.job_folder(job.id) / "work" / f"step-{number}"
    wait_for(mark.exists, f"step {number}")


def between_writes(store: JobStore, job: JobRecord) -> None:
    """Return just after a renewal: a process frozen in a transaction would hold its lock."""
    lease = store.get(job.id).lease_until
    wait_for(lambda: store.get(job.id).lease_until != lease, "a renewal")


def pool_process(worker: subprocess.Popen[bytes]) -> int:
    children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children")
    return int(wait_for(lambda: children.read_text().split(), "the pool process")[0])


def test_worker_runs_jobs_shows_itself_and_hands_back_on_sigterm(
    settings: Settings, store: JobStore, dispatcher: Dispatcher, start: Start, catalog: Catalog
) -> None:
    worker = start()
    first = store.submit(spec(label="steps=1")).job
    dispatcher.notify(first.id, first.queue)
    wait_state(store, first, "succeeded")
    assert [w.name for w in wait_for(catalog.workers, "the worker's row")] == ["tested"]
    for _ in range(3):
        dispatcher.notify(first.id, first.queue)
    second = store.submit(spec(label="steps=100 sleep=0.1")).job
    dispatcher.notify(second.id, second.queue)
    step(settings, second, 2)
    assert store.get(first.id).attempt == 1
    worker.terminate()
    job = wait_state(store, second, "queued")
    assert worker.wait(timeout=60) == 0
    assert job.handback_count == 1
    assert not processes_of(second.id)
    assert catalog.workers() == ()


def test_killed_worker_gives_its_job_to_the_next_one(
    settings: Settings, store: JobStore, reconciler: Reconciler, start: Start
) -> None:
    worker = start()
    job = store.submit(spec(label="steps=12 sleep=0.1")).job
    step(settings, job, 2)
    worker.kill()
    worker.wait()
    wait_for(lambda: not processes_of(job.id), "the runner's end", 5)
    start()
    job = wait_state(store, job, "succeeded", timeout=settings.lease_s + 10)
    assert job.result is not None
    assert job.result["made"] < 12


def test_killed_pool_process_is_replaced_and_the_job_runs_again_after_its_lease(
    settings: Settings, store: JobStore, reconciler: Reconciler, start: Start
) -> None:
    worker = start()
    job = store.submit(spec(label="steps=12 sleep=0.1")).job
    step(settings, job, 2)
    os.kill(pool_process(worker), signal.SIGKILL)
    job = wait_state(store, job, "succeeded", timeout=settings.lease_s + 10)
    assert (job.lost_count, job.attempt) == (1, 2)
    assert job.result is not None
    assert job.result["made"] < 12


def test_stopped_supervisor_is_fenced_when_it_wakes(
    settings: Settings, store: JobStore, reconciler: Reconciler, start: Start
) -> None:
    frozen = start()
    job = store.submit(spec(label="steps=60 sleep=0.1 do=hang")).job
    step(settings, job, 0)
    runner = int((settings.job_folder(job.id) / "work" / "pid").read_text())
    tree = [pool_process(frozen), frozen.pid]
    between_writes(store, job)
    for pid in tree:
        os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: not alive(runner), "the runner's own end", settings.lease_s + 2)
    wait_for(lambda: store.get(job.id).lost_count, "the lease's end", settings.lease_s + 2)
    start()
    wait_for(lambda: store.get(job.id).token == 2, "the second claim")
    for pid in tree:
        os.kill(pid, signal.SIGCONT)
    job = wait_state(store, job, "succeeded")
    assert (job.attempt, job.token) == (2, 2)
    keys = {a.storage_key.split("/")[1] for a in store.artifacts(job.id)}
    assert keys == {"2"}
    events = store.events(job.id)
    assert [e.data["state"] for e in events if e.kind == "state"].count("succeeded") == 1
    assert [e.seq for e in events] == list(range(1, len(events) + 1))


def test_garbage_in_the_broker_stops_nothing(
    settings: Settings, store: JobStore, reconciler: Reconciler, start: Start
) -> None:
    queue = settings.data / "broker" / "queue"
    queue.mkdir(parents=True, exist_ok=True)
    (queue / "0_a.cpu.msg").write_bytes(b"not json")
    (queue / "1_b.cpu.msg").write_bytes(b"")
    (queue / "2_c.cpu.msg").write_bytes(b'{"body": "x", "properties": {}}')
    job = store.submit(spec(label="steps=1")).job
    for _ in range(4):
        worker = start()
        if (
            wait_for(
                lambda worker=worker: worker.poll() is not None or store.get(job.id).finished,
                "a result or the worker's end",
            )
            and store.get(job.id).finished
        ):
            break
    assert store.get(job.id).state == "succeeded"
