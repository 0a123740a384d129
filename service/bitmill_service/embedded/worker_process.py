"""The worker beside the embedded API: one child process, started again when it dies.

The child's standard input is a pipe that nobody writes to. When the service ends, however it ends,
the kernel closes the pipe and the child asks itself to stop, which hands its job back. A child that
dies is started again after 1, 2, 4, ... 30 s; the delay starts over once one has lived a minute.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from pydantic import SecretStr

from bitmill.runtime.child import death
from bitmill_service.embedded.data_lock import FileLock
from bitmill_workers.settings import Settings

LOG_FILE = "worker.log"
_LONGEST_DELAY_S = 30.0
_HEALTHY_S = 60.0
_LOCK_WAIT_S = 30.0
_log = logging.getLogger(__name__)


def settings_environment(settings: Settings) -> dict[str, str]:
    """The environment variables from which a child reads the same settings.

    The worker's name stays out, because each process has its own.
    """
    found = {}
    for name in Settings.model_fields:
        value = getattr(settings, name)
        if value is None or name == "worker_name":
            continue
        if isinstance(value, SecretStr):
            text = value.get_secret_value()
        elif isinstance(value, tuple):
            text = ",".join(value)
        elif isinstance(value, dict):
            text = json.dumps({key: str(path.resolve()) for key, path in value.items()})
        else:
            text = str(value.resolve() if isinstance(value, Path) else value)
        found[f"BITMILL_{name.upper()}"] = text
    return found


class WorkerProcess:
    """Keeps one worker process alive from `start` to `stop`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stopping = threading.Event()
        self._child: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._supervise, name="worker-keeper", daemon=True)

    @property
    def pid(self) -> int | None:
        """Process id of the running child."""
        child = self._child
        return child.pid if child is not None and child.poll() is None else None

    def start(self) -> None:
        """Start the child and keep it running."""
        self._thread.start()

    def stop(self) -> None:
        """Ask the child to hand its job back and end; kill it when it takes too long."""
        self._stopping.set()
        child = self._child
        if child is not None:
            with suppress(ProcessLookupError):
                child.send_signal(signal.SIGTERM)
            try:
                child.wait(self._settings.stop_grace_s + 10)
            except subprocess.TimeoutExpired:
                _log.warning("the worker did not stop in time and is killed")
            _end_group(child)
        self._thread.join(timeout=10)

    def _supervise(self) -> None:
        delay = 1.0
        while not self._stopping.is_set():
            started = time.monotonic()
            self._child = self._spawn()
            if self._stopping.is_set():
                self._child.send_signal(signal.SIGTERM)
            status = self._child.wait()
            if self._stopping.is_set():
                return
            _close_input(self._child)
            delay = 1.0 if time.monotonic() - started > _HEALTHY_S else delay
            _log.warning("%s; next start in %g s", death("the worker", status).message, delay)
            self._stopping.wait(delay)
            delay = min(delay * 2, _LONGEST_DELAY_S)

    def _spawn(self) -> subprocess.Popen[bytes]:
        folder = self._settings.data / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOG_FILE).open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "bitmill_service.embedded.worker_process"],
                env={**os.environ, **settings_environment(self._settings)},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


def _end_group(child: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    _close_input(child)


def _close_input(child: subprocess.Popen[bytes]) -> None:
    if child.stdin is not None:
        child.stdin.close()


def _stop_with_input() -> None:
    """Wait until standard input closes, then ask this process to stop."""
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def worker_lock(settings: Settings) -> FileLock | None:
    """The lock of the one worker that a broker of files can serve; None for other brokers."""
    if not settings.embedded:
        return None
    return FileLock(settings.data / "worker.lock", what="the worker's data folder")


def main() -> int:
    """Run the worker until standard input closes or it is told to stop."""
    from bitmill_workers import worker

    settings = Settings()
    lock = worker_lock(settings)
    if lock is not None:
        lock.acquire(wait_s=_LOCK_WAIT_S)
    threading.Thread(target=_stop_with_input, name="lifeline", daemon=True).start()
    return worker.main()


if __name__ == "__main__":
    sys.exit(main())
