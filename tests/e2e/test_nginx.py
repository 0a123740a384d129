"""The proxy's own refusals: the deployed configuration in front of a server that always answers."""

from __future__ import annotations

import json
import re
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx2
import pytest

from bitmill_service.http.problems import CODES
from bitmill_service.main import create_app
from bitmill_service.settings import ServiceSettings
from servers import free_port, listens
from stores import wait_for

CONFIG = Path(__file__).parents[2] / "deploy" / "nginx.conf"
NGINX = shutil.which("nginx") or "/usr/sbin/nginx"


class Proxy:
    """nginx as deployed; its API and its object store are nginx too, and can be away."""

    def __init__(self, folder: Path, *, api_is_up: bool = True) -> None:
        self.port, self.storage, behind = free_port(), free_port(), free_port()
        text = CONFIG.read_text()
        upstream = behind if api_is_up else free_port()
        for old, new in (
            (
                "server api:8737 resolve max_fails=2 fail_timeout=5s;",
                f"server 127.0.0.1:{upstream};",
            ),
            ("server storage:9000 resolve;", f"server 127.0.0.1:{behind};"),
            ("listen 8080;", f"listen 127.0.0.1:{self.port};"),
            ("listen 9000;", f"listen 127.0.0.1:{self.storage};"),
            ("/tmp/", f"{folder}/"),
            ("/etc/nginx/listen-", f"{folder}/listen-"),
            ("client_header_timeout 15s;", "client_header_timeout 1s;"),
        ):
            assert old in text, old
            text = text.replace(old, new)
        answering = f"server {{ listen 127.0.0.1:{behind}; location / {{ return 200 'up'; }} }}"
        text = text.rstrip().removesuffix("}") + answering + "}\n"
        config = folder / "nginx.conf"
        config.write_text(text)
        self.url = f"http://127.0.0.1:{self.port}"
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [NGINX, "-c", str(config), "-g", "daemon off;"], stdout=log, stderr=log
            )
        wait_for(lambda: listens(self.port), "nginx")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    if not Path(NGINX).exists():
        pytest.skip("needs the Debian package nginx-light")
    return tmp_path


@pytest.fixture
def proxy(folder: Path) -> Iterator[Proxy]:
    found = Proxy(folder)
    yield found
    found.stop()


def problem(answer: httpx2.Response) -> dict[str, str]:
    """The problem document, after a look at what all of them have."""
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, str] = answer.json()
    assert set(body) == {
        *("type", "title", "status", "detail", "code", "param", "hint", "kind", "request_id")
    }
    assert body["status"] == answer.status_code
    assert body["type"] == f"urn:bitmill:error:{body['code']}"
    assert answer.headers["x-request-id"] == body["request_id"]
    if body["code"] in CODES:
        assert CODES[body["code"]][0] == answer.status_code
    return body


def pipelined(proxy: Proxy, path: str, count: int) -> bytes:
    """The answers to so many requests, sent at once over one connection.

    No client of a busy machine sends two hundred a second one after the other.
    """
    ask = f"GET {path} HTTP/1.1\r\nHost: x\r\n"
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=60) as link:
        link.sendall((f"{ask}\r\n" * (count - 1) + f"{ask}Connection: close\r\n\r\n").encode())
        data = b""
        while chunk := link.recv(1 << 16):
            data += chunk
    return data


def test_every_call_of_the_api_reaches_it(proxy: Proxy, tmp_path: Path) -> None:
    """nginx answers `/a` by a redirect where it has a location `/a/`, whatever the method is."""
    calls = create_app(ServiceSettings(data=tmp_path / "data")).openapi()["paths"]
    assert "post" in calls["/v1/uploads"]
    with httpx2.Client(base_url=proxy.url) as http:
        for path, methods in calls.items():
            for method in methods:
                answer = http.request(method, re.sub(r"\{[^}]*\}", "x", path))
                wanted = (403 if path == "/metrics" else 200, path, method)
                assert (answer.status_code, path, method) == wanted
        for page in ("/", "/ui/jobs", "/ui/uploads", "/docs", "/api/models/jobs/x"):
            assert http.get(page).status_code == 200


def test_ordinary_polling_is_never_refused(proxy: Proxy) -> None:
    """Fifty requests a second: a hundred jobs watched by clients that poll every two seconds."""
    with httpx2.Client(base_url=proxy.url) as http:
        started = time.monotonic()
        for number in range(300):
            assert http.get("/v1/jobs/x").status_code == 200
            time.sleep(max(0.0, started + number / 50 - time.monotonic()))


def test_a_flood_is_refused_with_the_time_to_wait(proxy: Proxy) -> None:
    data = pipelined(proxy, "/v1/jobs", 900)
    assert data.count(b"HTTP/1.1 200") >= 400
    refused = data.count(b"HTTP/1.1 429")
    assert refused > 0
    assert data.count(b"Retry-After: 1\r\n") == refused
    assert data.count(b"application/problem+json") == refused
    assert data.count(b'"code": "too_many_requests"') == refused
    assert b"text/html" not in data
    # A second later the client is served again.
    time.sleep(1)
    assert httpx2.get(proxy.url).status_code == 200


def test_downloads_are_not_counted(proxy: Proxy) -> None:
    data = pipelined(proxy, "/v1/jobs/a/files/b/c", 900)
    assert data.count(b"HTTP/1.1 200") == 900


def test_other_refusals_are_problem_documents(proxy: Proxy) -> None:
    with httpx2.Client(base_url=proxy.url) as http:
        assert problem(http.get("/metrics"))["code"] == "forbidden"
        large = http.post("/v1/jobs", content=b"x" * (33 << 20))
        assert problem(large)["code"] == "payload_too_large"
        assert problem(http.get("/", headers={"X": "y" * 40_000}))["code"] == "malformed_request"
        assert problem(http.get("/" + "y" * 40_000))["code"] == "uri_too_long"


def test_an_api_that_is_away_is_a_problem_document(folder: Path) -> None:
    proxy = Proxy(folder, api_is_up=False)
    try:
        answer = httpx2.get(f"{proxy.url}/v1/jobs")
    finally:
        proxy.stop()
    assert problem(answer)["code"] == "service_unavailable"
    assert (answer.status_code, answer.headers["retry-after"]) == (502, "2")


def test_half_open_connections_are_limited_and_ended(proxy: Proxy) -> None:
    with ExitStack() as links:
        half = []
        for _ in range(600):
            link = links.enter_context(socket.create_connection(("127.0.0.1", proxy.port)))
            link.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
            half.append(link)
        assert httpx2.get(proxy.url).status_code == 200
        half[0].settimeout(15)
        with suppress(ConnectionResetError):
            assert half[0].recv(100) == b""


def test_problem_documents_are_json(proxy: Proxy) -> None:
    text = httpx2.get(f"{proxy.url}/metrics").text
    assert json.loads(text)["status"] == 403


def test_tls_is_added_by_files_alone(tmp_path: Path) -> None:
    """The listeners of deploy/tls, with a certificate made here."""
    certificates = tmp_path / "certificates"
    certificates.mkdir()
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-nodes", "-days", "2"),
            *("-pkeyopt", "ec_paramgen_curve:prime256v1", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(certificates / "privkey.pem")),
            *("-out", str(certificates / "fullchain.pem")),
        ],
        check=True,
        capture_output=True,
    )
    ports = {}
    for name, listed in (("api", "8443"), ("storage", "9443")):
        ports[name] = free_port()
        text = (CONFIG.parent / "tls" / f"{name}.conf").read_text()
        assert f"listen {listed} ssl;" in text
        text = text.replace(f"listen {listed}", f"listen 127.0.0.1:{ports[name]}")
        folder = tmp_path / f"listen-{name}"
        folder.mkdir()
        (folder / "tls.conf").write_text(text.replace("/etc/nginx/certificates", str(certificates)))
    proxy = Proxy(tmp_path)
    try:
        trust = ssl.create_default_context(cafile=str(certificates / "fullchain.pem"))
        for port in ports.values():
            assert httpx2.get(f"https://127.0.0.1:{port}/", verify=trust).text == "up"
    finally:
        proxy.stop()
