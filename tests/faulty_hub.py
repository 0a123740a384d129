"""A Hub on loopback that makes the mistakes that it is told to make, and remembers its requests."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40
Headers = dict[str, str]
Mistake = Callable[["_Answer", bytes, Headers], None]
"""Answers one request; takes the file's bytes and the headers of a right answer."""


def git_id(data: bytes) -> str:
    """The git blob id of these bytes."""
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Request:
    """What was asked: `file` is "" for the listing."""

    method: str
    file: str
    range: str | None
    authorized: bool


class FaultyHub(ThreadingHTTPServer):
    """Serves `files` as org/tiny.

    mistakes: for "METHOD file" (the listing: "GET ") what befalls its first requests, in turn; None
    answers rightly. large: names of files that are listed with their SHA-256, the others have a
    git blob id. tags: the entity tags are "sha256", "git" or "none". elsewhere: the address of a
    second server that large files are redirected to. ranges: whether `Range` is understood.
    """

    daemon_threads = True

    def __init__(self, files: Mapping[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.files = dict(files)
        self.mistakes: dict[str, list[Mistake | None]] = {}
        self.large = {name for name in files if name.endswith(".safetensors")}
        self.tags, self.lists_digests, self.ranges = "git", True, True
        self.elsewhere: str | None = None
        self.requests: list[Request] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def asked(self, method: str, file: str) -> list[Request]:
        """The requests of one kind for one file, in order."""
        return [r for r in self.requests if (r.method, r.file) == (method, file)]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that the client or a mistake broke are no news."""


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyHub

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""

    def do_GET(self) -> None:
        hub, path = self.server, urlsplit(self.path).path
        file = unquote(re.sub(r"^/org/tiny/resolve/[^/]+/|^/api/.*", "", path))
        asked, token = self.headers.get("Range"), "Authorization" in self.headers
        hub.requests.append(Request(self.command, file, asked, token))
        data = hub.files.get(file, b"")
        headers = {"X-Repo-Commit": COMMIT} | self._tags(file, data)
        waiting = hub.mistakes.get(f"{self.command} {file}")
        mistake = waiting.pop(0) if waiting else None
        if mistake is not None:
            mistake(self, data, headers)
        elif path.startswith("/api/models/org/tiny/revision/"):
            self.send(200, self._listing(), {"Content-Type": "application/json"})
        elif path.startswith("/api/models/"):
            self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif file not in hub.files:
            self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif hub.elsewhere is not None and file in hub.large:
            linked = {"X-Linked-ETag": headers.get("ETag", ""), "X-Linked-Size": str(len(data))}
            self.send(302, b"", linked | {"Location": hub.elsewhere + self.path})
        else:
            self.file(data, headers)

    do_HEAD = do_GET  # noqa: N815

    def file(self, data: bytes, headers: Headers) -> None:
        """The right answer for a file."""
        asked = self.headers.get("Range")
        if asked is None or not self.server.ranges:
            self.send(200, data, headers)
            return
        start = int(asked.removeprefix("bytes=").partition("-")[0])
        if start >= len(data):
            self.send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            return
        told = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        self.send(206, data[start:], headers | told)

    def send(self, status: int, body: bytes, headers: Headers) -> None:
        self.start(status, len(body), headers)
        if self.command == "GET":
            self.wfile.write(body)

    def start(self, status: int, size: int, headers: Headers) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(size)} | headers).items():
            self.send_header(name, value)
        self.end_headers()

    def _tags(self, file: str, data: bytes) -> Headers:
        kind = self.server.tags
        if kind == "none":
            return {}
        sha = hashlib.sha256(data).hexdigest()
        return {
            "ETag": f'"{sha if kind == "sha256" or file in self.server.large else git_id(data)}"'
        }

    def _listing(self) -> bytes:
        siblings = []
        for name, data in sorted(self.server.files.items()):
            entry: dict[str, Any] = {"rfilename": name}
            if self.server.lists_digests:
                entry |= {"size": len(data), "blobId": git_id(data)}
                if name in self.server.large:
                    sha = hashlib.sha256(data).hexdigest()
                    entry["lfs"] = {"sha256": sha, "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        info = {"id": "org/tiny", "modelId": "org/tiny", "sha": COMMIT, "private": False}
        return json.dumps(info | {"gated": False, "tags": [], "siblings": siblings}).encode()


@contextmanager
def serving(hub: FaultyHub) -> Iterator[FaultyHub]:
    """Serve in a thread until the block ends."""
    thread = threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join(10)


def status(code: int, **headers: str) -> Mistake:
    """An answer with this status; headers with _ for -."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda answer, data, right: answer.send(code, b"sorry", named)


def wrong_bytes(answer: _Answer, data: bytes, headers: Headers) -> None:
    """The right length, the last bytes wrong."""
    answer.file(data[:-3] + b"???", headers)


def too_short(answer: _Answer, data: bytes, headers: Headers) -> None:
    """A shorter file, with a Content-Length that agrees with it."""
    answer.send(200, data[: len(data) // 3], headers)


def too_long(answer: _Answer, data: bytes, headers: Headers) -> None:
    """A longer file."""
    answer.send(200, data + b"more", headers)


def reset(answer: _Answer, data: bytes, headers: Headers) -> None:
    """Half of the file, then a TCP reset."""
    _half(answer, data, headers)
    linger = struct.pack("ii", 1, 0)
    answer.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    answer.connection.close()


def closed(answer: _Answer, data: bytes, headers: Headers) -> None:
    """Half of the file, then an orderly end of the connection."""
    _half(answer, data, headers)


def dropped(answer: _Answer, data: bytes, headers: Headers) -> None:
    """The connection ends before any answer."""
    answer.close_connection = True


def soon(answer: _Answer, data: bytes, headers: Headers) -> None:
    """429 with a date of now in Retry-After."""
    answer.send(429, b"", {"Retry-After": formatdate(usegmt=True)})


def _half(answer: _Answer, data: bytes, headers: Headers) -> None:
    asked = answer.headers.get("Range")
    start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
    if asked and answer.server.ranges:
        told = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        answer.start(206, len(data) - start, headers | told)
    else:
        start = 0
        answer.start(200, len(data), headers)
    answer.wfile.write(data[start : start + (len(data) - start) // 2])
    answer.wfile.flush()
    answer.close_connection = True
