"""What pages of other origins, and names that point at loopback, are refused."""

from __future__ import annotations

from pathlib import Path

import httpx2
import pytest

from bitmill_service.embedded.server import EmbeddedService
from bitmill_service.http.problems import ProblemError
from bitmill_service.http.same_origin import LOOPBACK_NAMES, SameOrigin
from bitmill_service.settings import ServiceSettings
from finished import Stack


def test_foreign_page_can_change_nothing(http: httpx2.Client, stack: Stack) -> None:
    job = stack.queued().id
    for origin in ("https://evil.example", "null", stack.url + "0", "http://[::1"):
        answer = http.post(f"/v1/jobs/{job}/cancel", headers={"Origin": origin})
        assert (answer.status_code, answer.json()["code"]) == (403, "cross_origin")
        assert answer.json()["request_id"] == answer.headers["x-request-id"]
    assert http.get(f"/v1/jobs/{job}").json()["state"] == "queued"
    own = http.post(f"/v1/jobs/{job}/cancel", headers={"Origin": stack.url})
    assert own.json()["state"] == "cancelled"


def test_embedded_service_answers_for_loopback_names_only(tmp_path: Path) -> None:
    with EmbeddedService(ServiceSettings(data=tmp_path, port=0), worker=False) as service:
        port = service.url.rpartition(":")[2]
        for host, status in [("evil.example", 421), (f"localhost:{port}", 200), ("127.0.0.1", 200)]:
            answer = httpx2.get(f"{service.url}/healthz", headers={"Host": host})
            assert answer.status_code == status, host


@pytest.mark.parametrize("host", ["[::1]:8737", "LOCALHOST:1", "127.0.0.1:8737"])
def test_names_of_loopback_are_recognized(host: str) -> None:
    SameOrigin(lambda *_: None, LOOPBACK_NAMES).check("GET", host, None)


@pytest.mark.parametrize(
    "host", ["", "127.0.0.1.evil.example", "localhost.evil.example:80", "[::1", "a]b"]
)
def test_other_names_are_refused(host: str) -> None:
    guard = SameOrigin(lambda *_: None, LOOPBACK_NAMES)
    with pytest.raises(ProblemError) as refused:
        guard.check("GET", host, None)
    assert refused.value.status == 421


def test_hosts_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITMILL_ALLOWED_HOSTS", "mill.example, 10.0.0.5")
    assert ServiceSettings().allowed_hosts == ("mill.example", "10.0.0.5")
