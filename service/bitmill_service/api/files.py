"""Serve one stored file: `Range`, `If-Range`, `ETag`, 304, `Repr-Digest`, HEAD.

The entity tag is the file's SHA-256, so it is strong, the same on every replica and usable to
resume (`If-Range`). `Repr-Digest` (RFC 9530) is the digest of the whole file on every answer, 206
included. Chunks of 4 MiB: with 64 KiB the event loop, not the disk, is the limit.

Given up: several ranges in one request. RFC 9110 section 14.2 lets a server ignore `Range`, and
the whole file is what such a client gets.
"""

from __future__ import annotations

import base64
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from urllib.parse import quote

from anyio import to_thread
from starlette.datastructures import Headers
from starlette.responses import Response, StreamingResponse
from starlette.types import Send

from bitmill_service.http.problems import ProblemError

CHUNK = 4 << 20
_RANGE = re.compile(r"bytes=([0-9]{0,19})-([0-9]{0,19})", re.IGNORECASE)
_TYPES = {
    ".json": "application/json",
    ".jinja": "text/plain; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
    ".md": "text/plain; charset=utf-8",
}


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


def _matches(header: str, etag: str) -> bool:
    """Weak comparison of `If-None-Match` (RFC 9110 section 13.1.2)."""
    tags = {tag.strip().removeprefix("W/") for tag in header.split(",")}
    return "*" in tags or etag in tags


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


class _FileStream(StreamingResponse):
    """Closes the file at once when the client goes away, not when the generator is collected."""

    async def stream_response(self, send: Send) -> None:
        body = self.body_iterator
        assert isinstance(body, AsyncGenerator)
        async with aclosing(body):
            await super().stream_response(send)


def _media_type(name: str) -> str:
    return _TYPES.get(Path(name).suffix, "application/octet-stream")


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


def head_response(name: str, size: int, sha256: str) -> Response:
    """The answer to HEAD of a file that is stored elsewhere: what is known of it here."""
    headers = _entity_headers(name, sha256) | {"content-length": str(size)}
    return Response(status_code=200, headers=headers, media_type=_media_type(name))


def file_response(file: StoredFile, method: str, request: Headers) -> StreamingResponse:
    """The answer to GET or HEAD of a stored file: 200, 206 or 304.

    Raises `ProblemError` `range_not_satisfiable`, and `file_missing` where the disk disagrees with
    the manifest.
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
    etag = headers["etag"]
    if _matches(request.get("if-none-match", ""), etag):
        return _FileStream(_chunks(file.path, 0, 0), 304, headers)
    fresh = request.get("if-range", etag) in (etag, modified)
    wanted = request.get("range") if method == "GET" and fresh else None
    span = parse_range(wanted, file.size)
    start, end = span or (0, file.size)
    if span:
        headers["content-range"] = f"bytes {start}-{end - 1}/{file.size}"
    headers["content-length"] = str(end - start)
    headers["content-type"] = _media_type(file.name)
    body = _chunks(file.path, start, end if method == "GET" else start)
    return _FileStream(body, 206 if span else 200, headers)
