"""Every refusal is a problem document; nothing of the inside leaks."""

from __future__ import annotations

import errno
import json
import logging
from pathlib import Path

import httpx2
import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from sqlalchemy.exc import DataError

from bitmill import errors
from bitmill_service.http import problems
from bitmill_service.http.middleware import RequestContext
from bitmill_service.http.problems import CODES, ProblemError, status_and_hint
from bitmill_service.main import create_app
from bitmill_service.settings import ServiceSettings
from bitmill_workers.errors import (
    IdempotencyMismatch,
    JobNotFound,
    StateConflict,
    StoreUnavailable,
)
from bitmill_workers.store.db import Database
from bitmill_workers.store.keys import KeyStore
from bitmill_workers.store.migrate import upgrade
from finished import Stack, spec_json
from serving import serve

MEMBERS = {"type", "title", "status", "detail", "code", "param", "hint", "kind", "request_id"}


def test_unknown_path_method_and_body_are_problems(http: httpx2.Client) -> None:
    answers = {
        404: http.get("/v1/nothing"),
        405: http.put("/v1/jobs"),
        400: http.post("/v1/jobs", content=b"{", headers={"Content-Type": "application/json"}),
        422: http.get("/v1/jobs", params={"limit": "many"}),
    }
    for status, answer in answers.items():
        assert answer.status_code == status
        assert answer.headers["content-type"] == "application/problem+json"
        body = answer.json()
        assert body.keys() == MEMBERS
        assert body["status"] == status
        assert body["type"] == f"urn:bitmill:error:{body['code']}"
    assert answers[422].json()["param"] == "limit"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("jobs", b'{"model": {}, "budget": {"bits": 3}, "budget": {"bits": 4}}'),
        ("jobs?validate_only=true", b'{"model": {}, "budget": {"bits": 3, "bits": 3}}'),
        ("sweeps", b'{"job": {}, "grid": {"seed": [1], "seed": [2]}}'),
        ("uploads", b'{"files": [], "files": []}'),
    ],
)
def test_a_member_that_stands_twice_is_refused(http: httpx2.Client, path: str, body: bytes) -> None:
    answer = http.post(f"/v1/{path}", content=body, headers={"Content-Type": "application/json"})
    assert "appears twice" in answer.json()["detail"]
    assert (answer.status_code, answer.json()["code"]) == (400, "malformed_request")


@pytest.mark.parametrize("query", ["limit=1&limit=2", "state=queued&state=running"])
def test_a_query_parameter_that_stands_twice_is_refused(http: httpx2.Client, query: str) -> None:
    answer = http.get(f"/v1/jobs?{query}")
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert "stands 2 times" in answer.json()["detail"]


def test_a_query_parameter_that_takes_several_may_stand_twice(
    http: httpx2.Client, stack: Stack
) -> None:
    kinds = "kind=state&kind=progress"
    assert http.get(f"/v1/jobs/{stack.queued().id}/events?{kinds}").status_code == 200


FORM = "application/x-www-form-urlencoded"


@pytest.mark.parametrize(
    "media",
    [FORM, "text/plain", "text/json", "application/xml", "multipart/form-data; boundary=x", None],
)
@pytest.mark.parametrize(
    "path", ["/v1/jobs", "/v1/jobs?validate_only=true", "/v1/profiles/x/allocate"]
)
def test_a_body_that_is_not_said_to_be_json_is_415(
    http: httpx2.Client, path: str, media: str | None
) -> None:
    headers = {} if media is None else {"Content-Type": media}
    answer = http.post(path, content=json.dumps(spec_json()).encode(), headers=headers)
    body = answer.json()
    assert (answer.status_code, body["code"]) == (415, "unsupported_media_type")
    assert body["param"] == "Content-Type"
    assert "application/json" in body["hint"]
    assert media is None or media in body["detail"]


@pytest.mark.parametrize(
    "media", ["application/json", "Application/JSON; charset=utf-8", "application/vnd.x+json"]
)
def test_other_spellings_of_json_are_taken(http: httpx2.Client, media: str) -> None:
    content = json.dumps(spec_json()).encode()
    answer = http.post("/v1/jobs", content=content, headers={"Content-Type": media})
    assert answer.status_code == 202


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/jobs", "GET, POST"),
        ("/v1/jobs/x", "DELETE, GET"),
        ("/v1/jobs/x/cancel", "POST"),
        ("/v1/jobs/x/events", "GET"),
        ("/v1/jobs/x/files/a/b", "GET, HEAD"),
        ("/v1/bit-width-maps", "GET, POST"),
        ("/v1/profiles", "GET"),
        ("/healthz", "GET"),
        ("/openapi.json", "GET, HEAD"),
    ],
)
@pytest.mark.parametrize("accept", ["*/*", "text/event-stream"])
def test_405_allows_every_method_of_the_path(
    http: httpx2.Client, path: str, allowed: str, accept: str
) -> None:
    for method in ("OPTIONS", "PUT", "PATCH", "TRACE"):
        answer = http.request(method, path, headers={"Accept": accept})
        assert answer.status_code == 405
        assert answer.headers["allow"] == allowed
        assert answer.json()["code"] == "method_not_allowed"


def test_body_over_the_limit_is_refused(http: httpx2.Client, stack: Stack) -> None:
    before = sum(stack.context.jobs.counts().values())
    big = spec_json(label="x" * (1 << 20))
    declared = http.post("/v1/jobs", json=big)
    chunked = http.post(
        "/v1/jobs",
        content=(b" " * 65536 for _ in range(20)),
        headers={"Content-Type": "application/json"},
    )
    for answer in (declared, chunked):
        assert (answer.status_code, answer.json()["code"]) == (413, "payload_too_large")
    assert sum(stack.context.jobs.counts().values()) == before


def test_request_id_is_echoed_where_it_is_harmless(http: httpx2.Client) -> None:
    given = http.get("/healthz", headers={"X-Request-ID": "abc-123"})
    assert given.headers["x-request-id"] == "abc-123"
    odd = http.get("/healthz", headers={"X-Request-ID": "a b<script>"})
    assert len(odd.headers["x-request-id"]) == 32


@pytest.mark.parametrize("keys", ["off", "auto", "required"])
def test_store_that_fails_answers_503_with_retry_after(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, keys: str
) -> None:
    """A database file that is no database, behind the real stores."""
    (tmp_path / "bitmill.db").write_bytes(b"this is no database" * 500)
    app = create_app(ServiceSettings(data=tmp_path, keys=keys))  # type: ignore[arg-type]
    other = Database(f"sqlite:///{tmp_path / 'other.db'}")
    upgrade(other)
    key, _ = KeyStore(other).create("a", scopes=["read"])
    other.close()
    headers = {"Authorization": f"Bearer {key}"}
    with caplog.at_level(logging.CRITICAL), serve(app, lifespan="off") as url:
        answer = httpx2.get(f"{url}/v1/jobs", headers=headers)
        page = httpx2.get(f"{url}/ui/jobs", headers=headers)
    app.state.context.database.close()
    assert (page.status_code, page.headers["retry-after"]) == (503, "5")
    assert page.headers["content-type"].startswith("text/html")
    assert "the job store does not answer" in page.text
    assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
    assert answer.headers["retry-after"] == "5"
    assert str(tmp_path) not in answer.text


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (sa.exc.TimeoutError("all connections are taken"), 503, "store_unavailable"),
        (OSError(errno.ENOSPC, "No space left on device"), 507, "disk_full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 507, "disk_full"),
        (OSError(errno.EIO, "Input/output error"), 500, "internal"),
    ],
)
def test_what_the_machine_refuses_is_told(
    error: Exception, status: int, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = FastAPI()
    problems.install(app)

    @app.get("/boom")
    def boom() -> None:
        raise error

    with caplog.at_level(logging.ERROR), serve(app) as url:
        answer = httpx2.get(f"{url}/boom")
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert [bool(record.exc_info) for record in caplog.records] == [status == 500]


def test_surprise_answers_500_without_a_trace(caplog: pytest.LogCaptureFixture) -> None:
    app = FastAPI()
    problems.install(app)

    app.add_middleware(RequestContext, registry=CollectorRegistry())

    @app.get("/boom")
    def boom() -> None:
        raise KeyError("secret detail")

    with caplog.at_level(logging.CRITICAL), serve(app) as url:
        answer = httpx2.get(f"{url}/boom")
    assert (answer.status_code, answer.json()["code"]) == (500, "internal")
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


def test_value_that_the_database_cannot_store_is_the_clients_fault() -> None:
    app = FastAPI()
    problems.install(app)

    @app.get("/nul")
    def nul() -> None:
        raise DataError("INSERT", {}, ValueError("secret"))

    with serve(app) as url:
        answer = httpx2.get(f"{url}/nul")
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert "secret" not in answer.text


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.SpecError("x"), 422),
        (errors.BudgetError("x"), 422),
        (errors.ModelError("x", code="pickle_refused"), 422),
        (errors.CalibrationError("x"), 422),
        (errors.FormatError("x"), 422),
        (errors.ResourceError("x"), 507),
        (errors.ResourceError("x", code="storage_unavailable"), 503),
        (errors.NumericalError("x"), 500),
        (errors.VerificationError("x"), 500),
        (errors.Cancelled("x"), 409),
        (errors.ModelError("x", code="file_not_found"), 422),
        (errors.FormatError("x", code="map_not_found"), 422),
        (JobNotFound("x"), 404),
        (StateConflict("x"), 409),
        (StateConflict("x", code="job_finished"), 409),
        (IdempotencyMismatch("x"), 422),
        (StoreUnavailable("x", code="wrong_schema"), 503),
        (StoreUnavailable("x"), 503),
    ],
)
def test_error_tree_has_a_status_and_advice(error: errors.BitmillError, status: int) -> None:
    found, hint = status_and_hint(error)
    assert found == status
    assert hint


def test_every_code_names_a_status_and_advice() -> None:
    for code, (status, hint) in CODES.items():
        assert 400 <= status < 600
        assert hint.endswith(".")
        assert ProblemError(code, "x").status == status
