"""Clients that never finish, never read, or come in thousands."""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import ClassVar

import httpx2
import psutil
import pytest
from fastapi import FastAPI, Request
from starlette.responses import StreamingResponse

from bitmill_service.http.connections import GuardedProtocol, connection_limit
from bitmill_service.main import create_app
from bitmill_service.settings import ServiceSettings
from bitmill_workers.store.migrate import upgrade
from finished import spec_json
from serving import serve
from stores import wait_for


class Quick(GuardedProtocol):
    """The same with deadlines that a test can wait for, and room for eight connections."""

    head_s, idle_s, body_s, write_s = 0.4, 0.4, 1.0, 0.5
    at_once: ClassVar[list[bool]] = []
    """Whether each connection sends without waiting."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self._limit = 8

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        link = transport.get_extra_info("socket")
        self.at_once.append(bool(link.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """An application that answers, reads, waits and sends without an end."""
    app = FastAPI()

    @app.get("/")
    def answer() -> str:
        return "ok"

    @app.post("/read")
    async def read(request: Request) -> int:
        return len(await request.body())

    @app.get("/slow")
    def slow() -> str:
        time.sleep(1.5)
        return "slow"

    @app.get("/endless")
    def endless() -> StreamingResponse:
        return StreamingResponse(b"x" * 65536 for _ in range(10**6))

    with serve(app, http=Quick) as found:
        yield found


def connect(url: str, *sent: bytes) -> socket.socket:
    address = httpx2.URL(url)
    assert address.port is not None
    link = socket.create_connection((address.host, address.port), timeout=10)
    for data in sent:
        link.sendall(data)
    return link


def closed_after(link: socket.socket) -> float:
    """Seconds until the server ends the connection."""
    started = time.monotonic()
    with link, suppress(ConnectionResetError):
        while link.recv(65536):
            pass
    return time.monotonic() - started


HALF = b"POST /read HTTP/1.1\r\nHost: x\r\n"
BODY = HALF + b"Content-Length: 100\r\n\r\n"


@pytest.mark.parametrize(
    "sent",
    [b"", b"G", HALF, HALF + b"Content-Le", BODY, BODY + b"x" * 50],
    ids=["nothing", "one byte", "half a head", "half a header", "no body", "half a body"],
)
def test_a_request_that_stops_is_ended(url: str, sent: bytes) -> None:
    assert 0.2 < closed_after(connect(url, sent)) < 5


def test_a_request_that_drips_is_ended(url: str) -> None:
    """Each byte comes within the time for one, all of them do not."""
    for begun, step in ((HALF, b"X: y\r\n"), (BODY, b"x")):
        started = time.monotonic()
        with connect(url, begun) as link, pytest.raises(OSError, match=r"reset|pipe"):
            while time.monotonic() - started < 20:
                link.sendall(step)
                time.sleep(0.1)
        assert time.monotonic() - started < 10


def test_a_second_request_that_stops_is_ended(url: str) -> None:
    link = connect(url, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert link.recv(65536).startswith(b"HTTP/1.1 200")
    link.sendall(b"GET / HT")
    assert closed_after(link) < 5


def test_an_answer_that_nobody_reads_is_broken_off(url: str) -> None:
    link = connect(url, b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n")
    wait_for(lambda: _broken(link), "the end of the answer", 20)
    link.close()


def _broken(link: socket.socket) -> bool:
    try:
        link.send(b"x")
    except OSError:
        return True
    return False


def test_work_is_not_ended_by_a_deadline(url: str) -> None:
    assert httpx2.get(f"{url}/slow").json() == "slow"
    body = b"x" * 300_000
    assert httpx2.post(f"{url}/read", content=body).json() == len(body)


def test_an_answer_does_not_wait_for_the_clients_acknowledgement(url: str) -> None:
    """Head and body are two writes; the second would wait for the client's word on the first."""
    before = len(Quick.at_once)
    assert httpx2.get(f"{url}/").status_code == 200
    assert Quick.at_once[before:] == [True]


def test_those_that_wait_make_room_for_new_ones(url: str) -> None:
    with ExitStack() as open_links:
        links = [open_links.enter_context(connect(url, HALF)) for _ in range(40)]
        assert httpx2.get(url, timeout=5).json() == "ok"
        assert links


def test_work_is_kept_and_a_new_connection_refused_where_all_work(url: str) -> None:
    with ExitStack() as open_links:
        ask = b"GET /slow HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        working = [open_links.enter_context(connect(url, ask)) for _ in range(8)]
        time.sleep(0.3)
        assert closed_after(connect(url, ask)) < 1
        for link in working:
            assert link.recv(65536).startswith(b"HTTP/1.1 200")


def test_what_is_no_http_gets_a_problem_document(url: str) -> None:
    with connect(url, b"\x16\x03\x01 nonsense\r\n\r\n") as link:
        answer = b""
        while data := link.recv(65536):
            answer += data
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"application/problem+json" in answer
    assert b'"code": "malformed_request"' in answer


@pytest.fixture
def service(tmp_path: Path) -> Iterator[str]:
    app = create_app(ServiceSettings(data=tmp_path, max_body=4096))
    upgrade(app.state.context.database)
    with serve(app, http=Quick, log_config=None) as found:
        yield found


def test_a_body_that_is_too_large_is_not_read_on(service: str) -> None:
    head = b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with connect(service, head + b"Transfer-Encoding: chunked\r\n\r\n") as link:
        sent = 0
        with pytest.raises(OSError, match=r"reset|pipe"):
            while sent < 200 << 20:
                link.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
                sent += 65536
    assert sent < 32 << 20
    answer = httpx2.post(f"{service}/v1/jobs", json=spec_json(label="x" * 5000))
    assert answer.status_code == 413
    assert answer.headers["connection"] == "close"


def test_bodies_that_stop_leave_no_stack_traces(
    service: str, caplog: pytest.LogCaptureFixture
) -> None:
    head = b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            closed_after(connect(service, head + b"Content-Length: 100\r\n\r\n{"))
        httpx2.get(f"{service}/healthz")
    assert [record.getMessage() for record in caplog.records] == []


@contextmanager
def limited_service(data: Path, files: int) -> Iterator[tuple[str, Path]]:
    """`bitmill serve` in a process that may open so many files: its address and its log."""
    words = f"{sys.executable} -P -m bitmill_service.cli.main serve --no-worker --port 0"
    log = data.with_suffix(".log")
    with log.open("wb") as said:
        process = subprocess.Popen(
            ["bash", "-c", f"ulimit -n {files}; exec {words} --data {data}"],
            stdout=said,
            stderr=said,
        )
    try:
        found = wait_for(lambda: _address(process.pid), "the service", 60)
        assert found is not None
        yield found, log
    finally:
        process.terminate()
        process.wait(60)


def _address(pid: int) -> str | None:
    for one in psutil.Process(pid).net_connections("tcp"):
        if one.status == psutil.CONN_LISTEN:
            with suppress(httpx2.TransportError):
                found = f"http://127.0.0.1:{one.laddr.port}"
                httpx2.get(f"{found}/healthz")
                return found
    return None


def test_a_thousand_half_open_connections_do_not_stop_the_service(tmp_path: Path) -> None:
    with limited_service(tmp_path / "data", 1024) as (address, log), ExitStack() as links:
        for _ in range(1100):
            links.enter_context(connect(address, HALF))
        times = []
        for _ in range(20):
            started = time.monotonic()
            assert httpx2.get(f"{address}/healthz", timeout=10).status_code == 200
            times.append(time.monotonic() - started)
        job = httpx2.get(f"{address}/v1/jobs", timeout=10)
        assert job.json()["jobs"] == []
        assert sorted(times)[10] < 2
        assert len(log.read_text().splitlines()) < 50


def test_the_limit_leaves_room_for_a_file_of_each_connection() -> None:
    assert 16 <= connection_limit() <= 8192
