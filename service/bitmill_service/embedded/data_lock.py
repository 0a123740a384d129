"""One service per data folder: an advisory lock that the kernel drops however its holder dies."""

from __future__ import annotations

import fcntl
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from bitmill.errors import InputError


class AlreadyInUse(InputError):
    """Another process holds what can be held once."""

    code = "data_folder_in_use"


class FileLock:
    """An exclusive lock on a file, which tells who holds it."""

    def __init__(self, path: Path, *, what: str) -> None:
        self._path, self._what = path, what
        self._handle: int | None = None

    def acquire(self, *, wait_s: float = 0.0) -> None:
        """Take the lock; raises `AlreadyInUse` naming the holder when it stays taken."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    holder = _holder(handle)
                    os.close(handle)
                    raise self._refusal(holder) from error
                time.sleep(0.1)
        self._handle = handle
        self.describe()

    def describe(self, **facts: Any) -> None:
        """Write who holds the lock, for the message that others get."""
        assert self._handle is not None
        data = json.dumps({"pid": os.getpid()} | facts).encode()
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, data, 0)

    def release(self) -> None:
        """Give the lock up; safe to repeat."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _refusal(self, holder: dict[str, Any]) -> AlreadyInUse:
        who = f"process {holder['pid']}" if "pid" in holder else "another process"
        where = f" at {holder['url']}" if "url" in holder else ""
        return AlreadyInUse(
            f"{self._what} {self._path.parent} is in use by {who}{where}: "
            "stop that one, or choose another folder with --data",
            param="data",
        )


def _holder(handle: int) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        found = json.loads(os.pread(handle, 4096, 0))
        if isinstance(found, dict):
            return found
    return {}
