"""A service whose PostgreSQL is stopped while its connections live on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from bitmill_service.main import create_app
from bitmill_service.settings import ServiceSettings
from bitmill_workers.store import postgres as connections
from bitmill_workers.store.migrate import upgrade
from finished import spec_json
from servers import Postgres
from serving import serve
from stores import wait_for

REQUESTS = 80
"""Twice as many as the service has threads for."""


@pytest.fixture
def http(
    tmp_path: Path, models: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> Iterator[httpx2.Client]:
    monkeypatch.setattr(connections, "IDLE_S", 1.0)
    monkeypatch.setattr(connections, "CONNECT_S", 2)
    url, roots = postgres.database(), {"models": models}
    app = create_app(ServiceSettings(data=tmp_path, database_url=url, model_roots=roots))
    upgrade(app.state.context.database)
    limits = httpx2.Limits(max_connections=REQUESTS + 1)
    with serve(app) as at, httpx2.Client(base_url=at, timeout=60, limits=limits) as client:
        yield client
    app.state.context.database.close()


def test_requests_are_refused_in_time_and_nothing_is_half_done(
    http: httpx2.Client, postgres: Postgres
) -> None:
    def submit(key: str) -> tuple[httpx2.Response, float]:
        began = time.monotonic()
        answer = http.post("/v1/jobs", json=spec_json(), headers={"Idempotency-Key": key})
        return answer, time.monotonic() - began

    assert submit("before")[0].status_code == 202
    with postgres.frozen(), ThreadPoolExecutor(REQUESTS) as pool:
        asked = [pool.submit(submit, str(number)) for number in range(REQUESTS)]
        began = time.monotonic()
        assert http.get("/healthz").status_code == 200
        assert time.monotonic() - began < 1
        ready = http.get("/readyz")
        refused = [one.result() for one in asked]
    assert ready.status_code == 503
    assert ready.json()["checks"]["database"].startswith("the database does not answer")
    for answer, _ in refused:
        assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
        assert answer.headers["Retry-After"] == "5"
    most = 2 * (connections.IDLE_S + connections.CONNECT_S)
    assert max(took for _, took in refused) < most
    wait_for(lambda: http.get("/readyz").status_code == 200, "the database", timeout=10)
    assert len(http.get("/v1/jobs").json()["jobs"]) == 1
    assert submit("0")[0].status_code == 202
