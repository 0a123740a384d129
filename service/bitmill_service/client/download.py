"""Download a finished job's files: verified, resumable across runs, in parallel.

A file is written to `.<name>.<first 12 digits of its SHA-256>.part`, checked against the manifest's
size and SHA-256 and renamed; what is already there and matches is not fetched again. What is there
and differs is replaced where a manifest beside it lists it, as one of an earlier result; anything
else is the user's. A part is continued with `Range` and `If-Range`, where the entity tag is the
file's SHA-256.
"""

from __future__ import annotations

import errno
import fcntl
import fnmatch
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import httpx2

from bitmill.errors import InputError, VerificationError, reason
from bitmill.io.atomic import disk_errors, sha256_file
from bitmill.io.manifest import MANIFEST_NAME
from bitmill.io.targets import may_be_of_result, result_names
from bitmill_service.client.errors import ServiceError, Unreachable, raise_for_problem
from bitmill_service.client.retries import RETRY_STATUS, Retries, Waiting, retry_after
from bitmill_service.schemas import FileView

_CHUNK = 1 << 20
_LOCK_POLL_S = 0.2


@dataclass(frozen=True)
class Download:
    """What a download did: files by path, and how many bytes crossed the wire."""

    folder: Path
    fetched: tuple[str, ...]
    skipped: tuple[str, ...]
    bytes_fetched: int


class _Interrupted(Exception):
    """The body ended early or the server asked to come back: continue from the part file."""

    def __init__(self, fault: str, wait: float | None = None) -> None:
        super().__init__(fault)
        self.wait = wait


class _NoSuchRest(_Interrupted):
    """What the part file holds is no beginning of what the server has."""


class _Refused(_Interrupted):
    """The object store takes the address no more; the service gives another."""


class _Stopped(Exception):
    """Another file has failed, or the user has had enough."""


def select(files: Sequence[FileView], include: Sequence[str]) -> list[FileView]:
    """Files whose path matches any of the glob patterns; all where there is none.

    Raises `InputError` for a pattern that matches nothing.
    """
    if not include:
        return list(files)
    for pattern in include:
        if not any(fnmatch.fnmatchcase(f.path, pattern) for f in files):
            raise InputError(
                f"no file matches {pattern!r}: there are {', '.join(f.path for f in files)}",
                code="no_such_file",
                param="include",
            )
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


def _hash_part(part: BinaryIO) -> tuple[int, hashlib._Hash]:
    digest, size = hashlib.sha256(), 0
    part.seek(0)
    while chunk := part.read(_CHUNK):
        digest.update(chunk)
        size += len(chunk)
    return size, digest


@contextmanager
def _file_errors(place: Path) -> Iterator[None]:
    """Turn what the file system says about one of the user's paths into a `BitmillError`."""
    try:
        with disk_errors(place):
            yield
    except (FileExistsError, IsADirectoryError, NotADirectoryError) as error:
        raise _in_the_way(place) from error
    except OSError as error:
        raise InputError(
            f"{place} cannot be written ({reason(error)}): choose another folder",
            code="cannot_write",
            param=str(place),
        ) from error


def _in_the_way(place: Path) -> InputError:
    """The error that names what stands where a file or one of its folders has to be."""
    for parent in reversed(place.parents):
        if parent.exists() and not parent.is_dir():
            place, what = parent, "a file, and a folder"
            break
    else:
        what = "a folder, and a file" if place.is_dir() else "no regular file, and one"
    return InputError(
        f"{place} is {what} has to be there: move it away, or choose another folder",
        code="path_in_the_way",
        param=str(place),
    )


def check_folder(folder: Path) -> None:
    """Refuse a folder that nothing can be downloaded to; makes nothing. Raises `InputError`."""
    with _file_errors(folder):
        place = next(one for one in (folder, *folder.absolute().parents) if _is_there(one))
        if not place.is_dir():
            raise _in_the_way(folder / "manifest.json")
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def check_free(folder: Path) -> None:
    """Refuse a folder where the result of a job that is not there yet may find a file of the
    user's in its way; makes nothing. Raises `InputError` as `download_files` would later.

    What another package's format writes is not known here: only the download meets it.
    """
    check_folder(folder)
    with _file_errors(folder):
        own = result_names(folder)
        for place in sorted([*folder.glob("*"), *folder.glob("*/*")]):
            path = place.relative_to(folder).as_posix()
            if not may_be_of_result(path) or path in own:
                continue
            raise _not_replaced(place, "the job may make a file of this name")


def _not_replaced(target: Path, why: str) -> InputError:
    if not target.is_file():
        return _in_the_way(target)
    return InputError(
        f"{target} is not replaced: {why}, and no manifest beside it lists it as one of an earlier "
        "result; choose another folder, or move it away",
        code="output_exists",
        param=str(target),
    )


def _is_there(place: Path) -> bool:
    try:
        place.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


class _FileDownload:
    """Fetches one file into its part file and moves it into place.

    The part file is locked while its bytes are fetched. Whoever finds it locked waits, and finds
    the file complete, or goes on where the other one died.
    """

    def __init__(
        self,
        http: httpx2.Client,
        elsewhere: httpx2.Client,
        file: FileView,
        target: Path,
        on_bytes: Callable[[int], None],
        retries: Retries,
        stop: threading.Event,
    ) -> None:
        self.http, self.elsewhere, self.retries, self.stop = http, elsewhere, retries, stop
        self.file, self.target, self.on_bytes = file, target, on_bytes
        self.part = target.with_name(f".{target.name}.{file.sha256[:12]}.part")
        self.fetched = 0
        self._furthest = 0

    def run(self) -> None:
        """Raises `VerificationError` when the bytes do not match the manifest twice in a row."""
        with _file_errors(self.target):
            self.target.parent.mkdir(parents=True, exist_ok=True)
            with self._own_part() as part:
                if part is not None:
                    self._fill(part)

    @contextmanager
    def _own_part(self) -> Iterator[BinaryIO | None]:
        """The part file, locked; None where another download has finished the file meanwhile."""
        told = False
        while True:
            with self.part.open("a+b") as part:
                if not _lock(part):
                    if not told:
                        self.retries.on_wait(f"another download fetches {self.file.path}; waiting")
                    told = True
                elif self._is_mine(part):
                    done = is_complete(self.file, self.target)
                    try:
                        yield None if done else part
                    finally:
                        self._drop_empty(part, done)
                    return
            if self.stop.is_set():
                raise _Stopped
            self.retries.sleep(_LOCK_POLL_S)

    def _is_mine(self, part: BinaryIO) -> bool:
        """Whether the locked file still has the part's name: another download may have moved it."""
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(part.fileno()), self.part.stat())
        return False

    def _drop_empty(self, part: BinaryIO, done: bool) -> None:
        if self._is_mine(part) and (done or os.fstat(part.fileno()).st_size == 0):
            self.part.unlink()

    def _fill(self, part: BinaryIO) -> None:
        for fresh in (False, True):
            if fresh:
                part.truncate(0)
                self._furthest = 0
            if self._complete(part):
                os.fsync(part.fileno())
                self.part.replace(self.target)
                return
        part.truncate(0)
        raise VerificationError(
            f"{self.file.path}: the bytes received do not have SHA-256 {self.file.sha256}; "
            "download again, and check the server's disk if it repeats",
            param=self.file.path,
        )

    def _complete(self, part: BinaryIO) -> bool:
        """Fetch what is missing; True where size and digest match the manifest."""
        waiting, refused = Waiting(self.retries, self.retries.patience), 0
        while True:
            before = self._furthest
            if self.stop.is_set():
                raise _Stopped
            try:
                return self._fetch(part)
            except (httpx2.TransportError, _Interrupted) as error:
                if self._furthest > before:
                    waiting.news()
                if isinstance(error, _NoSuchRest):
                    part.truncate(0)
                refused = refused + 1 if isinstance(error, _Refused) else 0
                if refused == self.retries.tries:
                    raise self._store_error(403) from error
                fault = f"{self.file.path}: {str(error) or type(error).__name__}"
                if not waiting.pause(fault, getattr(error, "wait", None)):
                    raise Unreachable(
                        f"{fault}: no more of it has come for {self.retries.patience:g} s; what "
                        "has arrived is kept, so download again to go on"
                    ) from error

    def _fetch(self, part: BinaryIO) -> bool:
        have, digest = _hash_part(part)
        self._furthest = max(self._furthest, have)
        if have < self.file.size:
            with self._answer(have) as response:
                if response.status_code != 206:
                    have, digest = 0, hashlib.sha256()
                have = self._append(part, response, have, digest)
            if have < self.file.size:
                raise _Interrupted(f"the answer ended after {have:,} of {self.file.size:,} bytes")
        return have == self.file.size and digest.hexdigest() == self.file.sha256

    @contextmanager
    def _answer(self, have: int) -> Iterator[httpx2.Response]:
        """The body from byte `have` on, or the whole one, wherever the service says it lies."""
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        # The object store has entity tags of its own, so `If-Range` is for the service alone.
        ours = headers | {"If-Range": f'"{self.file.sha256}"'}
        with self.http.stream("GET", self.file.url, headers=ours) as response:
            if not response.has_redirect_location:
                self._check(response, have)
                yield response
                return
            place = response.url.join(response.headers["location"])
        with self.elsewhere.stream("GET", place, headers=headers) as response:
            if response.status_code == 403:
                raise _Refused("the object store refuses its address")
            self._check(response, have)
            yield response

    def _check(self, response: httpx2.Response, have: int) -> None:
        status = response.status_code
        if status in RETRY_STATUS:
            raise _Interrupted(f"the server answers {status}", retry_after(response))
        here = response.headers.get("content-range", "").startswith(f"bytes {have}-")
        if status == 200 or (status == 206 and here):
            return
        if status in (206, 416):
            raise _NoSuchRest("the server has another rest of the file")
        response.read()
        if response.url.origin != self.http.base_url.origin:
            raise self._store_error(status)
        raise_for_problem(response)

    def _store_error(self, status: int) -> ServiceError:
        """Without the address, which is signed."""
        return ServiceError(
            f"{self.file.path}: the object store answers {status}; check its clock and its files",
            status=status,
            code=f"http_{status}",
            param=self.file.path,
        )

    def _append(
        self, part: BinaryIO, response: httpx2.Response, have: int, digest: hashlib._Hash
    ) -> int:
        part.truncate(have)
        for chunk in response.iter_bytes():
            if self.stop.is_set():
                raise _Stopped
            part.write(chunk)
            digest.update(chunk)
            have += len(chunk)
            self._furthest = max(self._furthest, have)
            self.fetched += len(chunk)
            self.on_bytes(len(chunk))
        part.flush()
        return have


def _lock(part: BinaryIO) -> bool:
    """Whether this download has the part file; a file system without locks gives it to everyone."""
    try:
        fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    return True


def is_complete(file: FileView, target: Path) -> bool:
    """Whether the file is there, with the size and digest of the manifest."""
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
    retries: Retries,
) -> Download:
    """Bring every file into `folder`, `parallel` at a time.

    Raises `InputError` before anything is fetched where a file would replace one of the user's, and
    what the first failing file raised; files that were finished stay and are skipped the next time.
    `on_bytes` may be called from several threads.
    """
    check_folder(folder)
    targets = [(file, safe_target(folder, file.path)) for file in files]
    for _, target in targets:
        with _file_errors(target):
            if target.exists() and not target.is_file():
                raise _in_the_way(target)
    with _file_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # Before they are compared: another download may bring a file meanwhile.
        there = [(file.path, target) for file, target in targets if target.exists()]
        skipped = [file.path for file, target in targets if is_complete(file, target)]
        own = result_names(folder)
    for path, target in there:
        if path not in own and path not in skipped:
            raise _not_replaced(target, "it differs from the file to download")
    stop = threading.Event()
    # Its own client, because the service's credentials are not for the object store.
    with (
        httpx2.Client(timeout=http.timeout, follow_redirects=True) as elsewhere,
        ThreadPoolExecutor(max_workers=max(1, parallel)) as pool,
    ):
        missing = [
            _FileDownload(http, elsewhere, file, target, on_bytes, retries, stop)
            for file, target in targets
            if file.path not in skipped
        ]
        # First, so that what comes after is known as a result's own, wherever this download ends.
        for one in missing:
            if one.file.path == MANIFEST_NAME:
                one.run()
        futures = [pool.submit(one.run) for one in missing if one.file.path != MANIFEST_NAME]
        try:
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
        finally:
            stop.set()
            for future in futures:
                future.cancel()
    return Download(
        folder=folder,
        fetched=tuple(one.file.path for one in missing),
        skipped=tuple(skipped),
        bytes_fetched=sum(one.fetched for one in missing),
    )
