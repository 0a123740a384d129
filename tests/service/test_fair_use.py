"""One client cannot take it all: rates, quotas, priorities and streams of a key."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest

from bitmill_service.http.access import LOCAL, Principal
from bitmill_service.http.fair_use import RateLimiter
from bitmill_service.http.problems import ProblemError
from bitmill_service.main import create_app
from bitmill_service.settings import ServiceSettings
from bitmill_workers.store.limits import Limits
from bitmill_workers.store.migrate import upgrade
from finished import Stack, spec_json
from serving import serve


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Stack]:
    settings = ServiceSettings(
        data=tmp_path_factory.mktemp("data"), model_roots={"models": models}, tenant_queued=2
    )
    app = create_app(settings)
    upgrade(app.state.context.database)
    with serve(app) as url:
        yield Stack(url, app.state.context)


def client(keyed: Stack, name: str, *, admin: bool = False, **limits: Any) -> httpx2.Client:
    """A client with a new key of a new tenant."""
    store = keyed.context.keys.store
    scopes: Any = ["admin"] if admin else ["read", "submit"]
    key, _ = store.create(name, scopes=scopes, limits=Limits(**limits))
    headers = {"Authorization": f"Bearer {key}"}
    return httpx2.Client(base_url=keyed.url, headers=headers, timeout=60)


def test_calls_over_the_rate_are_429_and_say_when_to_come_back(keyed: Stack) -> None:
    with client(keyed, "busy", requests_per_minute=5) as http:
        answers = [http.get("/v1/jobs") for _ in range(7)]
        assert [a.status_code for a in answers] == [200] * 5 + [429] * 2
        lefts = [a.headers["ratelimit"].split(";")[1] for a in answers]
        assert lefts == ["r=4", "r=3", "r=2", "r=1", "r=0", "r=0", "r=0"]
        assert answers[0].headers["ratelimit-policy"] == '"key";q=5;w=60'
        refused = answers[-1]
        assert refused.json()["code"] == "rate_limited"
        assert 1 <= int(refused.headers["retry-after"]) <= 12
        done = keyed.context.jobs.get(keyed.succeeded().id)
        path = f"/v1/jobs/{done.id}/files/model.safetensors"
        assert http.get(path).status_code == 404  # not counted, and not this tenant's
    with client(keyed, "other", requests_per_minute=5) as http:
        assert http.get("/v1/jobs").status_code == 200


def test_who_needs_no_key_is_not_counted(stack: Stack) -> None:
    answer = httpx2.get(stack.url + "/v1/jobs")
    assert "ratelimit" not in answer.headers
    limiter = RateLimiter(1)
    assert limiter.take(LOCAL, "/v1/jobs") is limiter.take(LOCAL, "/v1/jobs") is None


def test_a_bucket_fills_as_time_goes_by() -> None:
    now, waits = 0.0, set[str]()
    limiter = RateLimiter(60, clock=lambda: now)
    caller = Principal("t", frozenset({"read"}), "k", "t", Limits())

    def made(calls: int) -> int:
        count = 0
        for _ in range(calls):
            try:
                limiter.take(caller, "/v1/jobs")
            except ProblemError as refused:
                waits.add((refused.headers or {})["Retry-After"])
                return count
            count += 1
        return count

    assert made(100) == 60
    assert waits == {"1"}
    now = 10.5
    assert made(100) == 10
    now = 1000.0
    assert made(100) == 60
    own = Principal("t", frozenset({"read"}), "k2", "t", Limits(requests_per_minute=2))
    assert limiter.take(own, "/v1/jobs") is not None
    for path in ("/v1/jobs/x/files/a/b", "/jobs/x/resolve/main/f"):
        assert limiter.take(own, path) is None


def test_waiting_jobs_of_one_tenant_do_not_keep_others_out(keyed: Stack) -> None:
    with client(keyed, "greedy") as http:
        told = [http.post("/v1/jobs", json=spec_json()) for _ in range(3)]
        assert [a.status_code for a in told] == [202, 202, 429]
        assert told[-1].json()["code"] == "quota_queued"
        assert "at most 2 may" in told[-1].json()["detail"]
        assert int(told[-1].headers["retry-after"]) > 0
        first = told[0].json()["id"]
        http.post(f"/v1/jobs/{first}/cancel")
        assert http.post(f"/v1/jobs/{first}/retry").status_code == 202
        assert http.post(f"/v1/jobs/{first}/retry").json()["code"] == "quota_queued"
    with client(keyed, "patient") as http:
        assert http.post("/v1/jobs", json=spec_json()).status_code == 202
    with client(keyed, "rich", queued=4) as http:
        told = [http.post("/v1/jobs", json=spec_json()) for _ in range(5)]
        assert [a.status_code for a in told] == [202] * 4 + [429]


def test_bytes_over_the_quota_refuse_new_jobs(keyed: Stack) -> None:
    with client(keyed, "local", bytes=100) as http:  # the tenant that `finished` works for
        keyed.succeeded(b"w" * 200)
        answer = http.post("/v1/jobs", json=spec_json())
        assert (answer.status_code, answer.json()["code"]) == (429, "quota_bytes")


def test_priorities_stay_within_the_keys_range(keyed: Stack) -> None:
    with client(keyed, "urgent", priorities=(-10, 5), queued=10) as http:
        for priority, status in ((5, 202), (-10, 202), (6, 422), (100, 422), (-11, 422)):
            answer = http.post(f"/v1/jobs?priority={priority}", json=spec_json())
            assert answer.status_code == status, priority
            if status == 422:
                assert answer.json()["code"] == "priority_refused"
                assert "-10 to 5" in answer.json()["detail"]
    with client(keyed, "ops", admin=True) as http:
        assert http.post("/v1/jobs?priority=100", json=spec_json()).status_code == 202


def test_one_tenant_has_a_quarter_of_all_streams(
    keyed: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyed.context, "max_streams", 8)
    headers = {"Accept": "text/event-stream"}
    with client(keyed, "watcher") as http, client(keyed, "other") as other, ExitStack() as open_:
        job, theirs = (h.post("/v1/jobs", json=spec_json()).json()["id"] for h in (http, other))
        for _ in range(2):
            answer = open_.enter_context(
                http.stream("GET", f"/v1/jobs/{job}/events", headers=headers)
            )
            assert answer.status_code == 200
        refused = http.get(f"/v1/jobs/{job}/events", headers=headers)
        assert (refused.status_code, refused.json()["code"]) == (429, "too_many_streams")
        with other.stream("GET", f"/v1/jobs/{theirs}/events", headers=headers) as answer:
            assert answer.status_code == 200
