"""Bring files of a Hub repository into the cache: compared with what the Hub tells of them.

Every file's size and digest are asked first: the SHA-256 of large files, and of small ones the
entity tag, or else the git blob id, SHA-1("blob <size>\\0" + bytes). What lies in the cache already
is compared as well. Bytes that differ are fetched once more from the start, and then refused.

A request that meets a passing fault (no connection, reset, time-out, 408, 425, 429, 5xx) is made
again after min(30, 0.5 * 2^k) seconds times a random factor in [0.5, 1], or when the Hub's
`Retry-After` says; what has arrived stays in a part file and is continued with `Range`, by a later
job too. `patience_s` seconds without a byte end it.

The cache has the layout of the Hub's own client, blobs by digest and links to them by commit, so
both find each other's files. Its client is not used for the transfer: it compares nothing but the
size, and drops what has arrived when a connection is reset.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Self, TypeVar
from urllib.parse import quote

import httpx2

from bitmill.errors import ModelError, ResourceError
from bitmill.io.atomic import disk_errors, fsync_path

_CHUNK = 1 << 20
_PARALLEL = 4
_TIMEOUT = httpx2.Timeout(30.0, connect=10.0)
_PASSING = frozenset({408, 425, 429})
_DIGEST = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
_LOCK_NOTE_S = 30.0
_SHOW_S = 0.5
T = TypeVar("T")

Notify = Callable[[dict[str, object]], None]
"""Takes the messages of a supervised child, from any thread."""


@dataclass(frozen=True)
class HubFile:
    """A file of a repository and what the Hub tells of it.

    path: within the repository. size: bytes. digest: 64 hex digits of SHA-256 or 40 of a git blob
    id; None where the Hub tells neither.
    """

    path: str
    size: int | None = None
    digest: str | None = None

    def matches(self, file: Path) -> bool:
        """Whether a file on disk has the told size and digest."""
        if not file.is_file() or self.size not in (None, file.stat().st_size):
            return False
        return self.digest is None or self.digest == digest_of(file, git=len(self.digest) == 40)


def digest_of(file: Path, *, git: bool) -> str:
    """Hex SHA-256 of a file's bytes; with `git` its blob id."""
    if git:
        digest = hashlib.sha1(f"blob {file.stat().st_size}\0".encode(), usedforsecurity=False)
    else:
        digest = hashlib.sha256()
    with file.open("rb") as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def valid_digest(text: str | None) -> str | None:
    """The hex digits of a digest that the Hub tells, as it writes entity tags too; else None."""
    found = _DIGEST.fullmatch((text or "").removeprefix("W/").strip('"').lower())
    return found[0] if found else None


class Passing(Exception):
    """A fault that may be gone the next time.

    asked: seconds that the Hub wants to be left alone. progressed: something had arrived before.
    """

    def __init__(self, fault: str, asked: float | None = None, *, progressed: bool = False) -> None:
        super().__init__(fault)
        self.asked, self.progressed = asked, progressed


def passing_status(status: int) -> bool:
    """Whether a request that was answered so is worth another try."""
    return status in _PASSING or status >= 500


def asked_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds until the Hub wants to be asked again, from `Retry-After` or `RateLimit`."""
    value = headers.get("retry-after", "").strip()
    if value.isdecimal():
        return float(value)
    if value:
        try:
            at = parsedate_to_datetime(value)
        except ValueError:
            return None
        return max(0.0, (at.astimezone(UTC) - datetime.now(UTC)).total_seconds())
    left = re.search(r";\s*t=(\d{1,6})", headers.get("ratelimit", ""))
    return float(left[1]) if left else None


class Patience:
    """Repeats requests, for all threads of a download, until nothing has come for `seconds`."""

    def __init__(self, seconds: float, notify: Notify) -> None:
        self._seconds, self._notify = seconds, notify
        self._heard = time.monotonic()
        self._given_up = threading.Event()

    def heard(self) -> None:
        """Something new has arrived."""
        self._heard = time.monotonic()

    def check(self) -> None:
        """Raise where another thread has failed, so that this one's work is in vain."""
        if self._given_up.is_set():
            raise _GivenUp

    def give_up(self) -> None:
        """End the waits of all threads."""
        self._given_up.set()

    def repeat(self, what: str, request: Callable[[], T]) -> T:
        """The answer of `request`, which raises `Passing` where it is worth another try.

        Raises `ModelError` (code `hub_unreachable`) where patience has run out.
        """
        attempt = 0
        while True:
            try:
                answer = request()
            except Passing as fault:
                attempt = 0 if fault.progressed else attempt
                self._wait(what, fault, attempt)
                attempt += 1
            else:
                self.heard()
                return answer

    def _wait(self, what: str, fault: Passing, attempt: int) -> None:
        usual = min(30.0, 0.5 * 2.0 ** min(attempt, 6)) * random.uniform(0.5, 1.0)
        pause = max(usual, fault.asked or 0.0)
        silent = time.monotonic() - self._heard
        if silent + pause > self._seconds:
            asked = "" if fault.asked is None else f", which asks to wait {fault.asked:.0f} s"
            raise ModelError(
                f"the Hub did not deliver {what} ({fault}{asked}); nothing has come for "
                f"{silent:.0f} s: try again later, or check HF_ENDPOINT",
                code="hub_unreachable",
                param="model.repo_id",
            ) from fault
        message = f"{what}: {fault}; next try in {pause:.1f} s"
        self._notify({"kind": "warning", "stage": "resolve", "message": message})
        if self._given_up.wait(pause):
            raise _GivenUp


class _GivenUp(Exception):
    """Another thread has failed."""


class HubDownload:
    """Downloads from one commit of one repository into its folder of the cache.

    url: where the commit's files are resolved, ending in "/". headers: sent to that host alone.
    A context manager, which holds the repository's lock.
    """

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str],
        repository: Path,
        commit: str,
        patience: Patience,
        notify: Notify,
    ) -> None:
        self._url, self._origin = url, httpx2.URL(url).origin
        self._patience, self._notify = patience, notify
        self._blobs, self._commit = repository / "blobs", commit
        self.snapshot = repository / "snapshots" / commit
        self._lock_file = repository / ".bitmill.lock"
        self._http = httpx2.Client(headers=headers, timeout=_TIMEOUT, follow_redirects=True)
        self._progress = threading.Lock()
        self._sizes: dict[str, int] = {}
        self._arrived: dict[str, int] = {}
        self._furthest: dict[str, int] = {}
        self._shown = 0.0

    def __enter__(self) -> Self:
        self._blobs.mkdir(parents=True, exist_ok=True)
        self.snapshot.mkdir(parents=True, exist_ok=True)
        self._lock = self._lock_file.open("w")
        noted = -_LOCK_NOTE_S
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() - noted >= _LOCK_NOTE_S:
                    noted = time.monotonic()
                    self._say("another job downloads this model; waiting for it")
                time.sleep(0.2)
            else:
                self._patience.heard()
                return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()
        self._http.close()

    def told(self, file: HubFile) -> HubFile:
        """The file with what its own address tells, where the listing told no SHA-256."""
        if file.digest is not None and len(file.digest) == 64:
            return file
        return self._patience.repeat(file.path, lambda: self._ask(file))

    def missing_bytes(self, files: Sequence[HubFile]) -> int:
        """How much of the files is not in the cache yet, as far as sizes tell."""
        need = 0
        for file in files:
            places = (self._blob(file), self._part(file))
            have = max((p.stat().st_size for p in places if p.is_file()), default=0)
            need += max(0, (file.size or 0) - have)
        return need

    def fetch(self, files: Sequence[HubFile]) -> None:
        """Put every file into the snapshot.

        Raises `ModelError` (codes `hub_unreachable`, `hub_wrong_bytes`, `model_gated`,
        `file_not_found`), `ResourceError` where the disk is full.
        """
        self._sizes |= {file.path: file.size or 0 for file in files}
        same: dict[Path, list[HubFile]] = {}
        for file in files:
            same.setdefault(self._blob(file), []).append(file)
        with ThreadPoolExecutor(_PARALLEL) as pool:
            running = {pool.submit(self._fetch, blob, found) for blob, found in same.items()}
            done, waiting = wait(running, return_when=FIRST_EXCEPTION)
            if waiting:
                self._patience.give_up()
                for future in waiting:
                    future.cancel()
            for future in done:
                future.result()

    def _ask(self, file: HubFile) -> HubFile:
        with self._answer("HEAD", file.path, {}) as response:
            ours = [r for r in (*response.history, response) if r.url.origin == self._origin]
            linked = next((r.headers for r in ours if "x-linked-etag" in r.headers), None)
            if linked is not None:
                tag, size = linked["x-linked-etag"], linked.get("x-linked-size", "")
            elif response.is_success and ours[-1] is response:
                tag, size = (
                    response.headers.get("etag", ""),
                    response.headers.get("content-length", ""),
                )
            elif passing_status(response.status_code):
                raise _status(response)
            else:
                return file
        digest = valid_digest(tag)
        # A SHA-256 is worth more than a blob id; a tag of 40 digits says no more than the listing.
        if file.digest is not None and (digest is None or len(digest) == 40):
            digest = file.digest
        length = int(size) if file.size is None and size.isdecimal() else file.size
        return replace(file, size=length, digest=digest)

    def _fetch(self, blob: Path, files: Sequence[HubFile]) -> None:
        """Put files of the same bytes into the snapshot."""
        file = files[0]
        # Without a digest nothing says that what lies there is the Hub's file.
        if file.digest is not None and file.matches(blob):
            self._count(file, blob.stat().st_size)
        else:
            if file.digest is not None and blob.is_file():
                self._say(f"{file.path} in the cache is damaged and fetched again")
            blob.unlink(missing_ok=True)
            self._download(file, blob)
        for each in files:
            self._link(each, blob)

    def _blob(self, file: HubFile) -> Path:
        named = f"{self._commit}/{file.path}".encode()
        return self._blobs / (file.digest or hashlib.sha256(named).hexdigest())

    def _part(self, file: HubFile) -> Path:
        blob = self._blob(file)
        return blob.with_name(f"{blob.name}.part")

    def _download(self, file: HubFile, blob: Path) -> None:
        part = self._part(file)
        if file.digest is None:
            part.unlink(missing_ok=True)
        for fresh in (False, True):
            try:
                with disk_errors(blob):
                    receive = partial(self._receive, file, part, fresh=fresh)
                    self._patience.repeat(file.path, receive)
                    if file.matches(part):
                        fsync_path(part)
                        part.replace(blob)
                        fsync_path(blob.parent)
                        return
            except ResourceError as error:
                if error.code == "disk_full":  # else the disk stays full
                    part.unlink(missing_ok=True)
                raise
            part.unlink()
            self._furthest[file.path] = 0
            if not fresh:
                self._say(f"{file.path} arrived with wrong bytes and is fetched again")
        kind = "git blob id" if len(file.digest or "") == 40 else "SHA-256"
        told = f"{kind} {file.digest}" if file.digest else f"{file.size} bytes"
        raise ModelError(
            f"{file.path} arrived twice with other bytes than the Hub tells ({told}): try again "
            "later, and check a proxy or mirror on the way",
            code="hub_wrong_bytes",
            param=file.path,
        )

    def _receive(self, file: HubFile, part: Path, *, fresh: bool) -> None:
        """Append to the part file what is missing; raises `Passing` where something still is."""
        have = part.stat().st_size if part.is_file() else 0
        if have and have == file.size:
            return
        # A transfer that begins at 0 whenever it breaks makes no progress before it is further
        # than the one before.
        furthest = self._furthest[file.path] = max(have, self._furthest.get(file.path, 0))
        headers = {"Cache-Control": "no-cache"} if fresh else {}
        if have:
            headers["Range"] = f"bytes={have}-"
        with self._answer("GET", file.path, headers) as response:
            here = response.headers.get("content-range", "").startswith(f"bytes {have}-")
            if response.status_code == 416 or (response.status_code == 206 and not here):
                part.unlink(missing_ok=True)
                raise Passing("the Hub has no such rest of the file")
            self._check(file, response)
            if response.status_code != 206:
                have = 0
            with part.open("r+b" if have else "wb") as handle:
                handle.seek(have)
                try:
                    for chunk in response.iter_bytes():
                        handle.write(chunk)
                        have += len(chunk)
                        self._count(file, have)
                except httpx2.TransportError as error:
                    raise Passing(type(error).__name__, progressed=have > furthest) from error
        if file.size is not None and have < file.size:
            fault = f"the answer ended after {have:,} of {file.size:,} bytes"
            raise Passing(fault, progressed=have > furthest)

    @contextmanager
    def _answer(self, method: str, path: str, headers: dict[str, str]) -> Iterator[httpx2.Response]:
        headers = {"Accept-Encoding": "identity"} | headers
        try:
            with self._http.stream(method, self._url + quote(path), headers=headers) as response:
                yield response
        except httpx2.TransportError as error:
            raise Passing(type(error).__name__) from error

    def _check(self, file: HubFile, response: httpx2.Response) -> None:
        """Raise what a refused GET means."""
        status = response.status_code
        if response.is_success:
            return
        # An address that the Hub redirects to is good for a while only; asked again, it gives
        # another.
        if passing_status(status) or response.url.origin != self._origin:
            raise _status(response)
        if status in (401, 403):
            raise ModelError(
                f"the Hub refuses {file.path} (status {status}): ask for access and set a Hub "
                "token",
                code="model_gated",
                param="model.repo_id",
            )
        raise ModelError(
            f"the Hub lists {file.path} and does not deliver it (status {status}): check the "
            "repository",
            code="file_not_found",
            param=file.path,
        )

    def _link(self, file: HubFile, blob: Path) -> None:
        place = self.snapshot.joinpath(*PurePosixPath(file.path).parts)
        place.parent.mkdir(parents=True, exist_ok=True)
        link = place.with_name(f".tmp-{place.name}")
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(blob, place.parent))
        link.replace(place)

    def _count(self, file: HubFile, arrived: int) -> None:
        self._patience.check()
        with self._progress:
            self._arrived[file.path] = arrived
            if arrived > self._furthest.get(file.path, 0):
                self._furthest[file.path] = arrived
                self._patience.heard()
            if time.monotonic() - self._shown < _SHOW_S:
                return
            self._shown = time.monotonic()
            done, total = sum(self._arrived.values()), sum(self._sizes.values())
        self._notify(
            {
                "kind": "progress",
                "stage": "resolve",
                "done": done,
                "total": max(done, total),
                "unit": "byte",
            }
        )

    def _say(self, message: str) -> None:
        self._notify({"kind": "warning", "stage": "resolve", "message": message})


def _status(response: httpx2.Response) -> Passing:
    return Passing(f"status {response.status_code}", asked_wait(response.headers))
