"""Download a finished job's files: verified, resumable across runs, in parallel.

A file is written to `.<name>.<first 12 digits of its SHA-256>.part`, checked against the manifest's
size and SHA-256 and renamed; what is already there and matches is not fetched again. A part is
continued with `Range` and `If-Range`, where the entity tag is the file's SHA-256.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import httpx2

from bitmill.errors import VerificationError
from bitmill.io.atomic import disk_errors, sha256_file
from bitmill_service.client.errors import raise_for_problem
from bitmill_service.client.retries import RETRY_STATUS, backoff, retry_after
from bitmill_service.schemas import FileView

_CHUNK = 1 << 20
_TRIES = 6


@dataclass(frozen=True)
class Download:
    """What a download did: files by path, and how many bytes crossed the wire."""

    folder: Path
    fetched: tuple[str, ...]
    skipped: tuple[str, ...]
    bytes_fetched: int


class _Interrupted(Exception):
    """The body ended early or the server asked to come back: continue from the part file."""

    def __init__(self, wait: float | None = None) -> None:
        super().__init__()
        self.wait = wait


def select(files: Sequence[FileView], include: Sequence[str]) -> list[FileView]:
    """Files whose path matches any of the glob patterns; all where there is none."""
    if not include:
        return list(files)
    return [f for f in files if any(fnmatch.fnmatchcase(f.path, p) for p in include)]


def safe_target(folder: Path, path: str) -> Path:
    """Where a manifest path lies below `folder`; raises `VerificationError` where it leaves it."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or "\\" in path or "\0" in path or ".." in parts:
        raise VerificationError(
            f"the manifest names {path!r}, which is no path below the download folder; "
            "nothing was written for it",
            param=path,
        )
    return folder.joinpath(*parts)


def _hash_part(part: Path) -> tuple[int, hashlib._Hash]:
    digest, size = hashlib.sha256(), 0
    if part.exists():
        with part.open("rb") as handle:
            while chunk := handle.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
    return size, digest


class _FileDownload:
    """Fetches one file into its part file and moves it into place."""

    def __init__(
        self, http: httpx2.Client, file: FileView, target: Path, on_bytes: Callable[[int], None]
    ) -> None:
        self.http, self.file, self.target, self.on_bytes = http, file, target, on_bytes
        self.part = target.with_name(f".{target.name}.{file.sha256[:12]}.part")
        self.fetched = 0

    def run(self, sleep: Callable[[float], None]) -> None:
        """Raises `VerificationError` when the bytes do not match the manifest twice in a row."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        for fresh in (False, True):
            if fresh:
                self.part.unlink(missing_ok=True)
            if self._complete(sleep):
                self.part.replace(self.target)
                return
        self.part.unlink(missing_ok=True)
        raise VerificationError(
            f"{self.file.path}: the bytes received do not have SHA-256 {self.file.sha256}; "
            "download again, and check the server's disk if it repeats",
            param=self.file.path,
        )

    def _complete(self, sleep: Callable[[float], None]) -> bool:
        """Fetch what is missing; True where size and digest match the manifest."""
        for attempt in range(_TRIES):
            try:
                return self._fetch()
            except (httpx2.TransportError, _Interrupted) as error:
                if attempt == _TRIES - 1:
                    if isinstance(error, httpx2.TransportError):
                        raise
                    break
                sleep(getattr(error, "wait", None) or backoff(attempt))
        raise httpx2.ReadError(f"{self.file.path}: the connection broke {_TRIES} times")

    def _fetch(self) -> bool:
        have, digest = _hash_part(self.part)
        if have < self.file.size:
            headers = {"If-Range": f'"{self.file.sha256}"', "Accept-Encoding": "identity"}
            if have:
                headers["Range"] = f"bytes={have}-"
            with self.http.stream("GET", self.file.url, headers=headers) as response:
                if response.status_code in RETRY_STATUS:
                    raise _Interrupted(retry_after(response))
                if response.status_code not in (200, 206):
                    response.read()
                    raise_for_problem(response)
                if response.status_code == 200:
                    have, digest = 0, hashlib.sha256()
                have = self._append(response, have, digest)
            if have < self.file.size:
                raise _Interrupted
        return have == self.file.size and digest.hexdigest() == self.file.sha256

    def _append(self, response: httpx2.Response, have: int, digest: hashlib._Hash) -> int:
        with disk_errors(self.part), self.part.open("r+b" if have else "wb") as handle:
            handle.seek(have)
            for chunk in response.iter_bytes():
                handle.write(chunk)
                digest.update(chunk)
                have += len(chunk)
                self.fetched += len(chunk)
                self.on_bytes(len(chunk))
            handle.flush()
            os.fsync(handle.fileno())
        return have


def _is_complete(file: FileView, target: Path) -> bool:
    return (
        target.is_file()
        and target.stat().st_size == file.size
        and sha256_file(target) == file.sha256
    )


def download_files(
    http: httpx2.Client,
    files: Sequence[FileView],
    folder: Path,
    *,
    parallel: int,
    on_bytes: Callable[[int], None],
    sleep: Callable[[float], None],
) -> Download:
    """Bring every file into `folder`, `parallel` at a time.

    Raises what the first failing file raised; files that were finished stay and are skipped the
    next time. `on_bytes` may be called from several threads.
    """
    targets = [(file, safe_target(folder, file.path)) for file in files]
    folder.mkdir(parents=True, exist_ok=True)
    skipped = [file.path for file, target in targets if _is_complete(file, target)]
    missing = [
        _FileDownload(http, file, target, on_bytes)
        for file, target in targets
        if file.path not in skipped
    ]
    with ThreadPoolExecutor(max_workers=max(1, parallel)) as pool:
        futures = [pool.submit(one.run, sleep) for one in missing]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()
    return Download(
        folder=folder,
        fetched=tuple(one.file.path for one in missing),
        skipped=tuple(skipped),
        bytes_fetched=sum(one.fetched for one in missing),
    )
