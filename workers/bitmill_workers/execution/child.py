"""What every supervised child does first and last: lifeline, limits, messages, exit code.

Messages are JSON lines on the pipe whose number is the last argument: {"type": "progress", ...},
then one {"type": "result", ...} or {"type": "error", "error": `BitmillError.to_dict`}.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bitmill.errors import STOPS, as_bitmill_error
from bitmill_workers.execution.isolation import isolate_network
from bitmill_workers.execution.processes import start_lifeline

Emit = Callable[[dict[str, Any]], None]
_LOCK_WAIT_S = 30.0


class Emitter:
    """Writes messages to the pipe `fd`, each whole."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._lock = threading.Lock()

    def __call__(self, message: dict[str, Any]) -> None:
        data = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            while data:
                data = data[os.write(self.fd, data) :]


Work = Callable[[dict[str, Any], Emitter], dict[str, Any]]


def serve(argv: list[str], work: Work) -> int:
    """Run `work(request, emit)` for the supervisor and return the exit code.

    argv: path of the request (JSON, with `lease_s` and optionally `lock`, a file that only one
    child may hold, `file_bytes`, the largest file it may write, and `isolate`, to run without a
    network) and the message pipe.
    """
    request = json.loads(Path(argv[0]).read_bytes())
    start_lifeline(request["lease_s"])
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if limit := request.get("file_bytes"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    emit = Emitter(int(argv[1]))
    try:
        if request.get("isolate"):
            isolate_network(ranks=request.get("config", {}).get("devices", 1) > 1)
        with _only_one(request.get("lock")):
            result = work(request, emit)
    except STOPS:
        raise
    except BaseException as error:  # noqa: BLE001  (the boundary of the process)
        traceback.print_exc()
        emit({"type": "error", "error": as_bitmill_error(error).to_dict()})
        return 1
    emit({"type": "result", **result})
    return 0


@contextlib.contextmanager
def _only_one(lock: str | None) -> Iterator[None]:
    """Hold the lock file; an earlier child of the same job has at most moments to live."""
    if lock is None:
        yield
        return
    Path(lock).parent.mkdir(parents=True, exist_ok=True)
    with Path(lock).open("a") as handle:
        deadline = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RuntimeError("another runner of this job is still alive") from None
                time.sleep(0.1)
        yield
    sys.stdout.flush()
