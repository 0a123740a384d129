"""Jobs on several devices: the supervisor sees one runner, which is the launcher of the ranks."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bitmill.config.quantization import Calibration, Evaluation, FileText
from bitmill.errors import ResourceError
from bitmill_workers.execution import isolation
from bitmill_workers.execution.stop import StopRequest
from bitmill_workers.execution.supervisor import Supervisor
from bitmill_workers.job_spec import JobAllocation, JobRefinement
from bitmill_workers.settings import Settings
from bitmill_workers.store.db import Database
from bitmill_workers.store.jobs import JobStore
from bitmill_workers.store.records import JobRecord
from stores import processes_of, spec, wait_for
from tiny import tiny_llama

pytestmark = pytest.mark.e2e
TEXT = Path(__file__).parents[1] / "quant_core" / "calibration.txt"


@pytest.fixture
def machine(settings: Settings) -> Settings:
    """A worker on the CPU with the real runner and a model."""
    root = settings.model_roots["models"]
    tiny_llama(root / "llama", num_hidden_layers=3)
    (root / "text.txt").write_bytes(TEXT.read_bytes())
    changes = {"runner_module": "bitmill_workers.execution.runner", "device": "cpu", "threads": 2}
    return settings.model_copy(update=changes)


def submit(
    settings: Settings,
    database: Database,
    devices: int,
    *,
    sequences: int = 4,
    length: int = 64,
) -> JobRecord:
    asked = spec(
        "models/llama",
        devices=devices,
        allocation=JobAllocation(method="uniform", order="natural"),
        refinement=JobRefinement(compensated_grid=False, scale_refit=False, asymmetric=False),
        calibration=Calibration(
            text=FileText(path="models/text.txt"), sequences=sequences, length=length, held_out=2
        ),
        evaluation=Evaluation(texts=("wiki_evaluation",), sequences=2, length=64),
    )
    return Supervisor(settings, database).store.submit(asked).job


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    with StopRequest() as request:
        yield request


def ranks(settings: Settings) -> list[int]:
    """Process ids of the ranks at work."""
    ours = processes_of(str(settings.data))
    return [pid for pid in processes_of("bitmill_workers.execution.rank") if pid in ours]


def once_a_block_is_refined(settings: Settings, action: Callable[[], object]) -> threading.Thread:
    pattern = "*/work/.partial-refine/block-00000.json"

    def act() -> None:
        wait_for(lambda: list((settings.data / "jobs").glob(pattern)), "a block", timeout=120)
        action()

    thread = threading.Thread(target=act)
    thread.start()
    return thread


def test_a_dead_rank_is_a_crash_and_the_next_attempt_goes_on(
    machine: Settings, database: Database, stop: StopRequest
) -> None:
    job = submit(machine, database, 2)
    killer = once_a_block_is_refined(machine, lambda: os.kill(max(ranks(machine)), signal.SIGKILL))
    supervisor = Supervisor(machine, database)
    assert supervisor.run_next(stop)
    killer.join()
    assert not ranks(machine)
    first = supervisor.store.get(job.id)
    assert (first.state, first.crash_count) == ("queued", 1)
    block = machine.job_folder(job.id) / "work" / ".partial-refine" / "block-00000.safetensors"
    written = block.stat().st_mtime_ns
    seen: list[int] = []
    watcher = once_a_block_is_refined(machine, lambda: seen.append(block.stat().st_mtime_ns))
    wait_for(lambda: supervisor.run_next(stop), "the second attempt")
    watcher.join()
    assert not ranks(machine)
    done = JobStore(database).get(job.id)
    assert (done.state, done.attempt) == ("succeeded", 2)
    assert seen == [written]
    assert done.result is not None
    assert [row["method"] for row in done.result["quality"]["rows"]] == ["source", "uniform gptq"]
    events = JobStore(database).events(job.id)
    assert any("of 2 was ended by signal 9" in event.data.get("reason", "") for event in events)


def test_a_killed_check_is_tried_again_as_that(
    machine: Settings, database: Database, stop: StopRequest
) -> None:
    job = submit(machine, database, 1)

    def kill_the_check() -> None:
        folder = str(machine.job_folder(job.id).resolve() / "work" / ".partial-verify")
        os.kill(wait_for(lambda: processes_of(folder), "the check", timeout=120)[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_the_check)
    killer.start()
    supervisor = Supervisor(machine, database)
    assert supervisor.run_next(stop)
    killer.join()
    first = supervisor.store.get(job.id)
    assert (first.state, first.crash_count, first.error_code) == ("queued", 1, None)
    reason = supervisor.store.events(job.id)[-1].data["reason"]
    assert "checks the packed folder was ended by signal 9" in reason
    assert "verification failed" not in reason


def test_a_cancelled_job_leaves_no_rank(
    machine: Settings, database: Database, stop: StopRequest
) -> None:
    job = submit(machine, database, 2)
    store = JobStore(database)
    canceller = once_a_block_is_refined(machine, lambda: store.request_cancel(job.id))
    assert Supervisor(machine, database).run_next(stop)
    canceller.join()
    assert store.get(job.id).state == "cancelled"
    wait_for(lambda: not ranks(machine), "the ranks' end")


def test_more_devices_than_the_worker_has_are_refused_with_what_it_has(
    machine: Settings, database: Database, stop: StopRequest
) -> None:
    job = submit(machine, database, 64)
    assert Supervisor(machine, database).run_next(stop)
    failed = JobStore(database).get(job.id)
    assert (failed.state, failed.error_code, failed.error_param) == (
        "failed",
        "too_few_devices",
        "devices",
    )
    assert "asks for 64 devices, this machine has" in (failed.error_message or "")


def test_a_job_that_does_not_fit_is_not_tried_again(
    machine: Settings, database: Database, stop: StopRequest
) -> None:
    job = submit(machine, database, 1, sequences=65536, length=131072)
    assert Supervisor(machine, database).run_next(stop)
    failed = JobStore(database).get(job.id)
    assert (failed.state, failed.error_code, failed.crash_count) == ("failed", "does_not_fit", 0)
    assert failed.error_param == "calibration.sequences"
    assert "are free; what would fit: calibration.sequences" in (failed.error_message or "")


def test_ranks_are_not_started_behind_landlock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "_enter_namespace", lambda: False)
    with pytest.raises(ResourceError, match="give devices 1") as refused:
        isolation.isolate_network(ranks=True)
    assert refused.value.code == "cannot_isolate"
