"""Files that appear whole or not at all.

A file or folder is written under a temporary name beside its target, flushed to disk and renamed;
a crash leaves at most `.NAME.bitmill-partial`, which the next write of it removes.
A full disk is reported as `ResourceError` after the temporary file is gone.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Self

from bitmill.errors import FormatError, absent, disk_full, reason

_CHUNK = 4 << 20
_FLUSH_BYTES = 64 << 20


@contextmanager
def disk_errors(what: Path) -> Iterator[None]:
    """Turn a full disk or an exceeded quota into a `ResourceError` that names the file, a
    partial one by the name that it would get."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise disk_full(f"no space is left while {_final(what)} is written") from error
        raise


def fsync_path(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Flusher:
    """Flushes files to disk in a thread while they are written, so that the last flush is short.

    every: bytes from one flush to the next. Threads may call it at once. A context manager: no
    flush is under way behind it, and what went wrong in one was raised.
    """

    def __init__(self, every: int = _FLUSH_BYTES) -> None:
        self._every, self._bytes = every, 0
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="flush")
        self._flushing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown(wait=True)
        if kind is None and self._flushing is not None:
            self._flushing.result()

    def wrote(self, file: BinaryIO, count: int) -> None:
        """`count` more bytes of `file` are written. Raises what went wrong in a flush before."""
        with self._lock:
            self._bytes += count
            if self._bytes < self._every or (self._flushing and not self._flushing.done()):
                return
            if self._flushing is not None:
                self._flushing.result()
            self._bytes = 0
            self._flushing = self._thread.submit(os.fsync, file.fileno())


_PARTIAL = ".bitmill-partial"
_LONGEST_NAME = 255


def _temporary(target: Path) -> Path:
    return beside(target, _PARTIAL)


def beside(target: Path, ending: str) -> Path:
    """A hidden name beside `target` that tells what it belongs to: `.NAME<ending>`."""
    name = f".{target.name}{ending}"
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = f".{hashlib.sha256(os.fsencode(target.name)).hexdigest()}{ending}"
    return target.with_name(name)


def is_temporary(name: str) -> bool:
    """Whether a file or folder of this name is what a crash may have left."""
    return name.startswith(".") and name.endswith(_PARTIAL)


def _final(path: Path) -> str:
    name = path.name
    return name.removeprefix(".").removesuffix(_PARTIAL) if is_temporary(name) else name


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path beside `target`; the file written there takes its name once it is on disk."""
    temporary = _temporary(target)
    try:
        with disk_errors(target):
            yield temporary
            fsync_path(temporary)
            temporary.replace(target)
            fsync_path(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(target: Path, *data: bytes | memoryview) -> None:
    """Write a file atomically and durably, of pieces one behind the other."""
    with replacing(target) as temporary, temporary.open("wb") as handle:
        handle.writelines(data)


def write_json(target: Path, value: Any) -> None:
    """Write JSON atomically: two spaces of indent, keys in the given order."""
    write_bytes(target, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file; raises `FormatError` naming it where it is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FormatError(absent(path)) from error
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path.name} cannot be read as JSON: {reason(error)}") from error


def publish_folder(folder: Path, target: Path) -> None:
    """Flush a folder to disk and give it the name `target`, in place of what is there."""
    for parent, _, files in os.walk(folder):
        for name in files:
            fsync_path(Path(parent, name))
        fsync_path(Path(parent))
    if target.exists():
        shutil.rmtree(target)
    folder.rename(target)
    fsync_path(target.parent)


@contextmanager
def atomic_folder(target: Path, check: Callable[[Path], None] = lambda _: None) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` when the block ends without an error.

    An existing `target` is replaced; check(target) raises where it must not be. On an error nothing
    of the new folder stays.
    """
    temporary = _temporary(target)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with disk_errors(target):
            temporary.mkdir(parents=True)
            yield temporary
            check(target)
            publish_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
