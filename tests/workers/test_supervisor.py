"""One attempt, with a real runner process in its own group."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bitmill.errors import InputError, ProcessFailed, ResourceError
from bitmill_workers.execution.stop import StopRequest
from bitmill_workers.execution.supervisor import Supervisor
from bitmill_workers.settings import Settings
from bitmill_workers.store.db import Database
from bitmill_workers.store.jobs import JobStore
from bitmill_workers.store.records import JobRecord
from stores import alive, processes_of, set_columns, spec, wait_for


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    with StopRequest() as request:
        yield request


def run_label(
    settings: Settings, database: Database, stop: StopRequest, label: str, **fields: int
) -> JobRecord:
    """Submit a job whose runner acts as `label` says, and work until nothing is runnable."""
    supervisor = Supervisor(settings, database)
    job = supervisor.store.submit(spec(label=label, **fields)).job
    while supervisor.run_next(stop):
        pass
    return supervisor.store.get(job.id)


def during(action: Callable[[], object]) -> threading.Thread:
    """Do something while the test's own thread supervises."""
    thread = threading.Thread(target=action)
    thread.start()
    return thread


def runner_pid(settings: Settings) -> int:
    """Process id of the acting runner once it works."""
    jobs = settings.data / "jobs"
    found = wait_for(lambda: list(jobs.glob("*/work/step-0")), "the runner's first step")
    return int((found[0].parent / "pid").read_text())


def test_finished_job_shows_its_files_log_and_result(
    settings: Settings, database: Database, stop: StopRequest
) -> None:
    job = run_label(settings, database, stop, "steps=3 profile=abc")
    store = JobStore(database)
    assert (job.state, job.result, job.profile_id) == ("succeeded", {"steps": 3, "made": 3}, "abc")
    files = {a.path: a for a in store.artifacts(job.id)}
    assert sorted(files) == ["MANIFEST.json", "SHA256SUMS", "attempt.txt", "model.safetensors"]
    on_disk = settings.artifacts_folder / files["model.safetensors"].storage_key
    assert on_disk.stat().st_size == files["model.safetensors"].size == 1000
    assert b"starts" in store.read_log(job.id).data
    events = store.events(job.id)
    assert [e.seq for e in events] == list(range(1, len(events) + 1))
    assert [e.data["state"] for e in events if e.kind == "state"] == [
        "queued",
        "running",
        "finalizing",
        "succeeded",
    ]
    assert job.progress is not None
    assert job.progress["done"] == 3
    assert not settings.job_folder(job.id).exists()


def test_stored_specification_of_another_version_fails_by_name(
    settings: Settings, database: Database, stop: StopRequest
) -> None:
    supervisor = Supervisor(settings, database)
    job = supervisor.store.submit(spec()).job
    set_columns(database, job.id, spec=job.spec | {"colour": "red"})
    assert supervisor.run_next(stop)
    job = supervisor.store.get(job.id)
    assert (job.state, job.error_code, job.error_param) == ("failed", "invalid_spec", "colour")


def test_refused_input_fails_at_once_with_code_and_parameter(
    settings: Settings, database: Database, stop: StopRequest
) -> None:
    job = run_label(settings, database, stop, "do=refuse")
    assert (job.state, job.attempt, job.error_code, job.error_param) == (
        "failed",
        1,
        "invalid_calibration",
        "text",
    )
    assert job.error_message == "calibration text is empty"
    assert (type(job.error), job.error_hint) == (InputError, "Give a text.")
    assert not list(settings.artifacts_folder.glob("*"))
    assert not list((settings.data / "jobs").glob("*"))


@pytest.mark.parametrize("how", ["kill", "segfault", "raise"])
def test_dead_runner_is_tried_once_more_and_keeps_its_steps(
    settings: Settings, database: Database, stop: StopRequest, how: str
) -> None:
    job = run_label(settings, database, stop, f"steps=3 do={how}")
    assert (job.state, job.attempt, job.crash_count) == ("succeeded", 2, 1)
    assert job.result == {"steps": 3, "made": 2}


def test_runner_that_always_dies_fails_the_job(
    settings: Settings, database: Database, stop: StopRequest
) -> None:
    job = run_label(settings, database, stop, "do=kill always=1")
    assert (job.state, job.attempt, job.error_code) == ("failed", 2, "killed")
    assert "signal 9" in (job.error_message or "")
    assert type(job.error) is ResourceError


@pytest.mark.parametrize(
    ("how", "code"),
    [("segfault", "runner_crashed"), ("exit code=3", "runner_crashed"), ("raise", "internal")],
)
def test_fault_of_the_runner_is_told_as_one(
    settings: Settings, database: Database, stop: StopRequest, how: str, code: str
) -> None:
    job = run_label(settings, database, stop, f"do={how} always=1")
    assert (job.state, job.attempt, job.error_code) == ("failed", 2, code)
    assert type(job.error) is ProcessFailed
    assert job.error_hint == ProcessFailed.hint


@pytest.mark.parametrize("how", ["memory", "abort"])
def test_out_of_memory_goes_to_the_next_tier_once(
    settings: Settings, database: Database, stop: StopRequest, how: str
) -> None:
    job = run_label(settings, database, stop, f"do={how} always=1")
    assert (job.state, job.queue) == ("queued", "gpu-24")
    larger = settings.model_copy(update={"queues": ("cpu", "gpu-24")})
    assert Supervisor(larger, database).run_next(stop)
    job = JobStore(database).get(job.id)
    assert (job.state, job.attempt, job.error_code) == ("failed", 2, "out_of_memory")
    assert type(job.error) is ResourceError


def test_success_without_output_is_a_failure(
    settings: Settings, database: Database, stop: StopRequest
) -> None:
    job = run_label(settings, database, stop, "half=1")
    assert (job.state, job.error_code) == ("failed", "incomplete_output")
    assert JobStore(database).artifacts(job.id) == ()
    assert not list(settings.artifacts_folder.glob("*"))


def test_missing_model_fails_without_a_runner(
    settings: Settings, database: Database, stop: StopRequest
) -> None:
    supervisor = Supervisor(settings, database)
    job = supervisor.store.submit(spec("models/absent")).job
    assert supervisor.run_next(stop)
    job = supervisor.store.get(job.id)
    assert (job.state, job.error_code, job.log_size) == ("failed", "model_not_found", 0)


def test_cancel_ends_the_runner_and_its_children(
    settings: Settings, database: Database, stop: StopRequest
) -> None:
    store = JobStore(database)
    seen: list[int] = []

    def cancel() -> None:
        seen.append(runner_pid(settings))
        child = wait_for(lambda: list(settings.data.glob("jobs/*/work/grandchild")), "grandchild")
        seen.append(int(wait_for(child[0].read_text, "its id")))
        store.request_cancel(store.list().jobs[0].id)

    thread = during(cancel)
    job = run_label(settings, database, stop, "do=grandchild")
    thread.join()
    assert job.shown_state == "cancelled"
    assert len(seen) == 2
    for pid in seen:
        wait_for(lambda pid=pid: not alive(pid), "the group's end", 5)
    assert not processes_of(job.id)


def test_deadline_ends_a_running_job(
    settings: Settings, database: Database, stop: StopRequest
) -> None:
    job = run_label(settings, database, stop, "do=hang", deadline_s=1)
    assert (job.state, job.error_code) == ("failed", "deadline")
    assert not processes_of(job.id)


def test_silent_runner_is_dumped_and_stopped(
    settings: Settings, database: Database, stop: StopRequest
) -> None:
    impatient = settings.model_copy(update={"stall_s": 1.5})
    job = run_label(impatient, database, stop, "do=hang")
    assert (job.state, job.error_code) == ("failed", "stalled")
    assert b"_misbehave" in JobStore(database).read_log(job.id).data


def test_fenced_attempt_kills_its_runner_and_writes_nothing(
    settings: Settings, database: Database, stop: StopRequest
) -> None:
    store = JobStore(database)
    pids: list[int] = []

    def take_away() -> None:
        pids.append(runner_pid(settings))
        job = store.list().jobs[0]
        set_columns(database, job.id, token=job.token + 1, owner="other")

    thread = during(take_away)
    job = run_label(settings, database, stop, "do=hang")
    thread.join()
    assert (job.state, job.owner, job.token) == ("running", "other", 2)
    assert not alive(pids[0])
    assert not list(settings.artifacts_folder.glob("*/1"))


def test_stop_signal_hands_the_job_back_and_the_next_attempt_continues(
    settings: Settings, database: Database, stop: StopRequest
) -> None:
    def ask() -> None:
        runner_pid(settings)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = during(ask)
    supervisor = Supervisor(settings, database)
    job = supervisor.store.submit(spec(label="steps=3 do=hang")).job
    started = time.monotonic()
    assert supervisor.run_next(stop)
    thread.join()
    assert time.monotonic() - started < 60
    job = supervisor.store.get(job.id)
    assert (job.state, job.handback_count, job.lost_count) == ("queued", 1, 0)
    with StopRequest() as again:
        assert supervisor.run_next(again)
    job = supervisor.store.get(job.id)
    assert (job.state, job.result) == ("succeeded", {"steps": 3, "made": 2})


def test_runner_sees_no_secret_and_its_log_is_capped(
    settings: Settings, database: Database, stop: StopRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    monkeypatch.setenv("BITMILL_DATABASE_URL", "postgresql://canary")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    small = settings.model_copy(update={"log_bytes": 4096, "host_bytes": 1 << 34})
    job = run_label(small, database, stop, "environment=1 do=chatter")
    page = JobStore(database).read_log(job.id)
    assert (job.state, page.size, len(page.data)) == ("succeeded", 4096, 4096)
    shown = page.data.decode().split("environment ")[1].splitlines()[0].split()
    assert {"HF_HUB_OFFLINE", "BITMILL_HOST_BYTES"} <= set(shown)
    assert not {"HF_TOKEN", "BITMILL_DATABASE_URL", "AWS_SECRET_ACCESS_KEY"} & set(shown)


def test_file_limit_is_reported_as_a_full_disk(
    settings: Settings, database: Database, stop: StopRequest
) -> None:
    limited = settings.model_copy(update={"runner_file_bytes": 1 << 20})
    job = run_label(limited, database, stop, "do=fill")
    assert (job.state, job.attempt, job.error_code) == ("failed", 1, "disk_full")


def test_full_disk_that_the_database_is_on_too_fails_the_job_by_name(
    settings: Settings, stop: StopRequest, small_disk: Path, empty: Path
) -> None:
    one = settings.model_copy(update={"data": small_disk})
    shutil.copyfile(empty, small_disk / empty.name)
    database = Database(one.database)
    job = run_label(one, database, stop, "do=fill always=1")
    assert (job.state, job.attempt, job.error_code) == ("failed", 1, "disk_full")
    assert run_label(one, database, stop, "steps=1").state == "succeeded"
    database.close()


def test_full_disk_fails_the_job_and_leaves_nothing(
    settings: Settings, database: Database, stop: StopRequest, small_disk: Path
) -> None:
    (settings.data / "jobs").parent.mkdir(parents=True, exist_ok=True)
    (settings.data / "jobs").symlink_to(small_disk)
    job = run_label(settings, database, stop, "do=fill always=1")
    assert (job.state, job.attempt, job.error_code) == ("failed", 1, "disk_full")
    assert not list(small_disk.iterdir())
    assert run_label(settings, database, stop, "steps=1").state == "succeeded"
