"""Serve one stored file: conditions, `Range`, `If-Range`, `ETag`, `Repr-Digest`, HEAD.

The entity tag is the file's SHA-256, so it is strong, the same on every replica and usable to
resume (`If-Range`). `Repr-Digest` (RFC 9530) is the digest of the whole file on every answer, 206
included. The kernel sends it where the server can (`http/zero_copy.py`), else chunks of 4 MiB do:
with 64 KiB the event loop, not the disk, is the limit.

Given up: several ranges in one request. RFC 9110 section 14.2 lets a server ignore `Range`, and
the whole file is what such a client gets.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from email.utils import formatdate, parsedate_to_datetime
from pathlib import Path
from urllib.parse import quote

from anyio import to_thread
from starlette.datastructures import Headers
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from bitmill_service.http.problems import ProblemError
from bitmill_service.http.zero_copy import EXTENSION as ZERO_COPY

CHUNK = 4 << 20
_RANGE = re.compile(r"bytes=([0-9]{0,4000})-([0-9]{0,4000})", re.IGNORECASE)
_HELD = frozenset({"if-match", "if-unmodified-since"})
OTHER_TYPE = "application/octet-stream"
TYPES = {
    ".json": "application/json",
    ".jinja": "text/plain; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
    ".md": "text/plain; charset=utf-8",
}


ReadPart = Callable[[int, int], bytes]
"""Bytes [start, end) of a file, fewer at its end."""


@dataclass(frozen=True)
class StoredFile:
    """A file on disk and what its manifest says about it: size in bytes, hex SHA-256."""

    path: Path
    name: str
    size: int
    sha256: str


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """Half-open byte range (start, end) of a single `Range`, or None for the whole file.

    A header that is malformed or names several ranges is ignored (RFC 9110 section 14.2).
    Raises `ProblemError` 416 for a range that lies outside the file.
    """
    match = _RANGE.fullmatch(header.strip()) if header else None
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if first and last and int(last) < int(first):
        return None
    start = int(first) if first else max(size - int(last), 0)
    end = min(int(last) + 1, size) if first and last else size
    if start >= size:
        raise ProblemError(
            "range_not_satisfiable",
            f"range {header!r} lies outside the file's {size} bytes",
            param="Range",
            headers={"Content-Range": f"bytes */{size}"},
        )
    return start, end


def _names(header: str, etag: str, *, weakly: bool) -> bool:
    """Whether a list of entity tags, or `*`, names the file (RFC 9110 section 8.8.3.2)."""
    tags = {tag.strip() for tag in header.split(",")}
    if weakly:
        tags = {tag.removeprefix("W/") for tag in tags}
    return "*" in tags or etag in tags


def _seconds(date: str | None, otherwise: float) -> float:
    """Time of an HTTP date; where there is none, or what is no date, something else."""
    try:
        return parsedate_to_datetime(date).timestamp() if date else otherwise
    except (ValueError, OverflowError):
        return otherwise


def check_conditions(request: Headers, sha256: str, modified: float | None) -> bool:
    """Whether the client has the file already (304), by the order of RFC 9110 section 13.2.2.

    modified: seconds since the epoch, None where they are not known here. Raises `ProblemError`
    `precondition_failed`.
    """
    etag, second = f'"{sha256}"', None if modified is None else int(modified)
    if (match := request.get("if-match")) is not None:
        if not _names(match, etag, weakly=False):
            raise ProblemError(
                "precondition_failed", f"the file's entity tag is {etag}", param="If-Match"
            )
    elif second is not None and second > _seconds(request.get("if-unmodified-since"), math.inf):
        raise ProblemError(
            "precondition_failed",
            f"the file was modified at {formatdate(second, usegmt=True)}",
            param="If-Unmodified-Since",
        )
    if (none_match := request.get("if-none-match")) is not None:
        return _names(none_match, etag, weakly=True)
    return second is not None and second <= _seconds(request.get("if-modified-since"), -math.inf)


async def _chunks(path: Path, start: int, end: int) -> AsyncGenerator[bytes]:
    if start >= end:
        return
    handle = await to_thread.run_sync(path.open, "rb")
    try:
        await to_thread.run_sync(handle.seek, start)
        while start < end:
            chunk = await to_thread.run_sync(handle.read, min(CHUNK, end - start))
            if not chunk:
                raise OSError(f"{path.name} is shorter than its manifest says")
            start += len(chunk)
            yield chunk
    finally:
        handle.close()


async def _parts(first: bytes, read: ReadPart, start: int, end: int) -> AsyncGenerator[bytes]:
    """Bytes [start, end) of a file that lies elsewhere; the first have been read."""
    chunk = first
    while chunk:
        start += len(chunk)
        yield chunk
        if start >= end:
            return
        chunk = await to_thread.run_sync(read, start, min(start + CHUNK, end))
    raise OSError("a stored file is shorter than its manifest says")


class _FileStream(StreamingResponse):
    """Closes the file at once when the client goes away, not when the generator is collected."""

    async def stream_response(self, send: Send) -> None:
        body = self.body_iterator
        assert isinstance(body, AsyncGenerator)
        async with aclosing(body):
            await super().stream_response(send)


class _DiskFile(Response):
    """Bytes [start, end) of a file on disk: by the kernel where the server can, else in chunks."""

    def __init__(self, path: Path, start: int, end: int, status: int, headers: Mapping[str, str]):
        super().__init__(None, status, headers)
        self._path, self._start, self._end = path, start, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start, end = self._start, self._end
        if start == end or ZERO_COPY not in scope.get("extensions", {}):
            body = _chunks(self._path, start, end)
            await _FileStream(body, self.status_code, self.headers)(scope, receive, send)
            return
        with await to_thread.run_sync(self._path.open, "rb") as file:
            head = {"status": self.status_code, "headers": self.raw_headers}
            await send({"type": "http.response.start", **head})
            piece = {"file": file, "offset": start, "count": end - start, "more_body": True}
            await send({"type": ZERO_COPY, **piece})
            await send({"type": "http.response.body"})


def _media_type(name: str) -> str:
    return TYPES.get(Path(name).suffix, OTHER_TYPE)


def _entity_headers(name: str, sha256: str) -> dict[str, str]:
    digest = base64.b64encode(bytes.fromhex(sha256)).decode()
    base = quote(name.rpartition("/")[2], safe="")
    return {
        "accept-ranges": "bytes",
        "cache-control": "private, max-age=31536000, immutable",
        "content-disposition": f"attachment; filename*=utf-8''{base}",
        "etag": f'"{sha256}"',
        "repr-digest": f"sha-256=:{digest}:",
    }


def elsewhere_response(
    name: str, size: int, sha256: str, method: str, request: Headers, url: Callable[[], str]
) -> Response:
    """The answer for a file that is stored elsewhere: what is known of it here, 304, or 302.

    url: makes an address that is good for GET alone. Raises `ProblemError` `precondition_failed`.
    """
    headers = _entity_headers(name, sha256)
    if check_conditions(request, sha256, None):
        return Response(status_code=304, headers=headers)
    if method == "HEAD":
        headers["content-length"] = str(size)
        return Response(status_code=200, headers=headers, media_type=_media_type(name))
    return RedirectResponse(url(), 302)


def file_response(
    file: StoredFile, method: str, request: Headers, location: str | None = None
) -> Response:
    """The answer to GET or HEAD of a stored file: 200, 206 or 304.

    location: where nginx, in front of this service, has the file (`X-Accel-Redirect`): it sends the
    bytes of a GET itself. A condition that nginx would look at again is answered here.
    Raises `ProblemError` `precondition_failed`, `range_not_satisfiable`, and `file_missing` where
    the disk disagrees with the manifest.
    """
    try:
        stat = file.path.stat()
    except FileNotFoundError as error:
        raise ProblemError("file_missing", f"{file.name} is no longer stored") from error
    if stat.st_size != file.size:
        raise ProblemError(
            "file_missing", f"{file.name} has {stat.st_size} bytes, its manifest says {file.size}"
        )
    modified = formatdate(stat.st_mtime, usegmt=True)
    headers = _entity_headers(file.name, file.sha256) | {"last-modified": modified}
    if check_conditions(request, file.sha256, stat.st_mtime):
        return Response(status_code=304, headers=headers)
    span = _span(file.size, method, request, validators=(headers["etag"], modified))
    headers["content-type"] = _media_type(file.name)
    if location is not None and method == "GET" and not _HELD.intersection(request):
        return Response(headers=headers | {"x-accel-redirect": quote(location)})
    start, end = _describe(headers, span, file.size)
    end = end if method == "GET" else start
    return _DiskFile(file.path, start, end, 206 if span else 200, headers)


def relayed_response(
    name: str, size: int, sha256: str, method: str, request: Headers, read: ReadPart
) -> Response:
    """The answer for a file that is stored elsewhere and is sent by this service all the same.

    The first bytes are read before the answer begins, so that a store that does not give them is
    an error of its own. Raises as `file_response` and as `read` do.
    """
    headers = _entity_headers(name, sha256)
    if check_conditions(request, sha256, None):
        return Response(status_code=304, headers=headers)
    span = _span(size, method, request, validators=(headers["etag"],))
    headers["content-type"] = _media_type(name)
    start, end = _describe(headers, span, size)
    if method != "GET" or start >= end:
        return Response(status_code=206 if span else 200, headers=headers)
    first = read(start, min(start + CHUNK, end))
    return _FileStream(_parts(first, read, start, end), 206 if span else 200, headers)


def _span(
    size: int, method: str, request: Headers, *, validators: Collection[str]
) -> tuple[int, int] | None:
    """The range that is asked for, where it is asked of the file as it is."""
    fresh = "if-range" not in request or request["if-range"] in validators
    return parse_range(request.get("range") if method == "GET" and fresh else None, size)


def _describe(headers: dict[str, str], span: tuple[int, int] | None, size: int) -> tuple[int, int]:
    """Say in the headers which bytes follow; which they are."""
    start, end = span or (0, size)
    if span:
        headers["content-range"] = f"bytes {start}-{end - 1}/{size}"
    headers["content-length"] = str(end - start)
    return start, end
