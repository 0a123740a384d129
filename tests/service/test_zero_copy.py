"""Files that the kernel sends: right bytes, on connections that are kept, to clients that read."""

from __future__ import annotations

import gc
import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import psutil
import pytest
from fastapi import FastAPI, Request
from starlette.responses import Response

from bitmill_service.api.files import StoredFile, file_response
from bitmill_service.http.connections import GuardedProtocol
from bitmill_service.http.zero_copy import EXTENSION
from serving import serve
from stores import wait_for

CONTENT = os.urandom((9 << 20) + 17)


class Impatient(GuardedProtocol):
    """The same, with a deadline that a test can wait for."""

    write_s = 0.5


@dataclass(frozen=True)
class Sent:
    """A service of one file, and the file."""

    url: str
    path: Path

    def is_open(self) -> bool:
        """Whether this process still holds the file."""
        gc.collect()
        return str(self.path) in {file.path for file in psutil.Process().open_files()}


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sent]:
    path = tmp_path_factory.mktemp("files") / "weights"
    path.write_bytes(CONTENT)
    file = StoredFile(path, "weights", len(CONTENT), "0" * 64)
    app = FastAPI()

    @app.api_route("/file", methods=["GET", "HEAD"])
    def read(request: Request) -> Response:
        assert EXTENSION in request.scope["extensions"]
        return file_response(file, request.method, request.headers)

    with serve(app, http=Impatient) as url:
        yield Sent(url, path)


@pytest.mark.parametrize("cold", [False, True])
def test_answers_follow_each_other_on_one_connection(sent: Sent, cold: bool) -> None:
    if cold:
        with sent.path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    size = len(CONTENT)
    with httpx2.Client(base_url=sent.url, limits=httpx2.Limits(max_connections=1)) as http:
        for first, last in ((0, size - 1), (0, 0), (5 << 20, size - 1), (size - 1, size - 1)):
            part = http.get("/file", headers={"Range": f"bytes={first}-{last}"})
            assert (part.status_code, part.content == CONTENT[first : last + 1]) == (206, True)
        assert http.head("/file").headers["content-length"] == str(size)
        assert http.get("/file").content == CONTENT
    assert not sent.is_open()


def test_a_client_that_reads_nothing_or_goes_away_is_let_go(
    sent: Sent, caplog: pytest.LogCaptureFixture
) -> None:
    address = httpx2.URL(sent.url)
    assert address.port is not None
    with caplog.at_level(logging.WARNING):
        for stays in (True, False):
            link = socket.socket()
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            link.connect((address.host, address.port))
            link.sendall(b"GET /file HTTP/1.1\r\nHost: x\r\n\r\n")
            assert link.recv(100).startswith(b"HTTP/1.1 200")
            if not stays:
                link.close()
            wait_for(lambda: not sent.is_open(), "the end of the answer", 20)
            link.close()
        assert httpx2.get(f"{sent.url}/file").content == CONTENT
    assert [record.getMessage() for record in caplog.records] == []
