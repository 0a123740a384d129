"""Scripts, styles and pictures of the pages, from memory, at an address that names their content.

    /ui/static/<digest of all files>/<name>

One digest for all, so that a script's relative imports stay within one version; browsers may keep
what they got forever. An address of another version answers with today's file, to be asked for
again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from fastapi import APIRouter, Request, Response

from bitmill_service.http.access import PAGES
from bitmill_service.http.problems import ProblemError

TYPES = {
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "txt": "text/plain; charset=utf-8",
}
FOREVER = "public, max-age=31536000, immutable"

router = APIRouter()


@dataclass(frozen=True)
class StaticFile:
    """A file's bytes, media type and ETag."""

    data: bytes
    media_type: str
    etag: str


@cache
def static_files() -> Mapping[str, StaticFile]:
    """All files of `static/` by name."""
    found = {}
    for entry in files("bitmill_service.pages").joinpath("static").iterdir():
        data = entry.read_bytes()
        etag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
        found[entry.name] = StaticFile(data, TYPES[entry.name.rpartition(".")[2]], etag)
    return found


@cache
def version() -> str:
    """Digest of all files."""
    etags = sorted((name, file.etag) for name, file in static_files().items())
    return hashlib.sha256(repr(etags).encode()).hexdigest()[:16]


def static(name: str) -> str:
    """The address of a file of `static/`."""
    assert name in static_files(), name
    return f"{PAGES}/static/{version()}/{name}"


@router.get("/static/{digest}/{name}")
@router.head("/static/{digest}/{name}")
def read_static(request: Request, digest: str, name: str) -> Response:
    """A file; 304 where the browser has it."""
    file = static_files().get(name)
    if file is None:
        raise ProblemError("not_found", f"there is no file {name[:80]!r} of the pages")
    headers = {
        "ETag": file.etag,
        "Cache-Control": FOREVER if digest == version() else "no-cache",
    }
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.data, media_type=file.media_type, headers=headers)
