"""Settings reach the worker unchanged; a worker that dies at once is started again, more slowly."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import pytest

from bitmill_service.embedded.data_lock import AlreadyInUse, FileLock
from bitmill_service.embedded.worker_process import WorkerProcess, settings_environment, worker_lock
from bitmill_service.settings import ServiceSettings
from bitmill_workers.settings import Settings
from stores import wait_for


def test_child_reads_the_same_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ServiceSettings.model_validate(
        {
            "data": tmp_path / "data",
            "model_roots": {"a": tmp_path, "b c": tmp_path / "x=y"},
            "queues": ("cpu", "gpu-24"),
            "hub_token": "hf_secret",
            "threads": 3,
            "lease_s": 12.5,
            "renew_s": 2,
            "runner_module": "acting_runner",
        }
    )
    for name, value in settings_environment(given).items():
        monkeypatch.setenv(name, value)
    read = Settings()
    for name in Settings.model_fields:
        if name != "worker_name":
            assert getattr(read, name) == getattr(given, name), name


def test_worker_that_cannot_run_is_tried_again_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The database has no schema, so every start ends at once."""
    with caplog.at_level(logging.WARNING):
        worker = WorkerProcess(ServiceSettings(data=tmp_path))
        worker.start()
        wait_for(lambda: len(caplog.messages) >= 2, "two starts", 90)
        worker.stop()
    assert "next start in 1 s" in caplog.messages[0]
    assert "next start in 2 s" in caplog.messages[1]
    assert "bitmill db upgrade" in (tmp_path / "logs/worker.log").read_text()
    assert worker.pid is None


def test_lock_is_exclusive_and_names_its_holder(tmp_path: Path) -> None:
    first = FileLock(tmp_path / "lock", what="the data folder")
    first.acquire()
    first.describe(url="http://127.0.0.1:1")
    second = FileLock(tmp_path / "lock", what="the data folder")
    with pytest.raises(AlreadyInUse, match=r"process \d+ at http://127\.0\.0\.1:1"):
        second.acquire()
    timer = threading.Timer(0.3, first.release)
    timer.start()
    started = time.monotonic()
    second.acquire(wait_s=20)
    assert time.monotonic() - started >= 0.2
    timer.join()
    second.release()


def test_only_a_broker_of_files_limits_workers(tmp_path: Path) -> None:
    assert worker_lock(Settings(data=tmp_path)) is not None
    assert worker_lock(Settings(data=tmp_path, broker_url="redis://localhost/0")) is None
