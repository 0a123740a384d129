"""The typed client against the real API, and against servers that fail on purpose."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse

from bitmill.errors import (
    BitmillError,
    BudgetError,
    CalibrationError,
    FormatError,
    ModelError,
    NumericalError,
    ResourceError,
    VerificationError,
)
from bitmill_service.client import client as client_module
from bitmill_service.client.client import Client
from bitmill_service.client.errors import (
    JobCancelled,
    JobFailed,
    ServiceError,
    Unauthorized,
    Unreachable,
    WaitTimeout,
)
from bitmill_service.schemas import EventView
from bitmill_workers.errors import WorkerLost
from bitmill_workers.job_spec import parse_spec
from bitmill_workers.store.records import JobRecord
from finished import MAP, REPORT, Stack, spec_json
from serving import serve
from tcp_proxy import TcpProxy


def test_submit_get_list_cancel_retry_delete(client: Client) -> None:
    job = client.submit(spec_json(label="by client"))
    assert client.get(job.id).state == "queued"
    assert [j.id for j in client.list_jobs(label="by client").jobs] == [job.id]
    assert client.cancel(job.id).state == "cancelled"
    child = client.retry(job.id)
    assert (child.parent_id, child.terminal) == (job.id, False)
    client.delete(job.id)
    with pytest.raises(ServiceError) as gone:
        client.get(job.id)
    assert (gone.value.code, gone.value.status) == ("job_not_found", 404)


def test_typed_and_plain_specifications_mean_the_same(client: Client) -> None:
    spec = spec_json(seed=3)
    assert client.submit(spec).spec == client.submit(parse_spec(spec)).spec
    assert client.plan(spec).linears == 14


def test_refusal_carries_the_problem(client: Client) -> None:
    with pytest.raises(ServiceError) as refused:
        client.submit(spec_json(budget={"code_bits": 1.2}))
    error = refused.value
    assert isinstance(error, BudgetError)
    assert (error.code, error.param, error.status) == (
        "impossible_budget",
        "budget.code_bits",
        422,
    )
    assert error.hint
    assert error.request_id


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"budget": {"size": 1000}}, BudgetError),
        ({"model": {"source": "path", "path": "models/none"}}, ModelError),
        ({"calibration": {"text": {"source": "file", "path": "models/no"}}}, CalibrationError),
    ],
)
def test_refusal_is_of_the_class_that_the_library_raises(
    client: Client, changes: dict[str, Any], kind: type[Exception]
) -> None:
    with pytest.raises(kind) as refused:
        client.submit(spec_json(**changes))
    assert isinstance(refused.value, ServiceError)
    again = BitmillError.from_dict(kind("x").to_dict())
    assert type(again) is kind


@pytest.mark.parametrize(
    "error",
    [
        VerificationError("codes differ", param="layer"),
        ResourceError("it was killed", code="killed", hint="Free memory."),
        FormatError("é is damaged", code="odd"),
        WorkerLost("too often"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_failed_job_carries_the_error_as_it_left(
    client: Client, stack: Stack, error: BitmillError
) -> None:
    job = stack.running()
    assert stack.leases.fail(job.id, job.token, error)
    with pytest.raises(JobFailed) as failed:
        client.wait(job.id)
    found = failed.value
    assert type(found.error) is type(error)
    assert found.error.to_dict() == error.to_dict()
    assert (found.code, found.param, found.hint) == (error.code, error.param, error.hint)


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        ("InputError.BudgetError.OfTomorrow", BudgetError),
        ("ServiceError", ServiceError),
        ("JobNotFound", ServiceError),
        ("BitmillError", ServiceError),
        (None, ServiceError),
        (["x"], ServiceError),
    ],
)
def test_refusal_of_another_version_is_its_nearest_known_class(
    kind: object, base: type[Exception]
) -> None:
    app = FastAPI()

    @app.get("/v1/jobs/{job_id}")
    def refuse(job_id: str) -> JSONResponse:
        return JSONResponse({"kind": kind, "code": "new", "detail": "d", "hint": "h"}, 422)

    with serve(app) as url, Client(url) as client, pytest.raises(base) as refused:
        client.get("x")
    error = refused.value
    assert isinstance(error, ServiceError)
    assert (error.code, error.message, error.hint, error.status) == ("new", "d", "h", 422)


def test_lists_of_maps_hold_every_page(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_PAGE", 2)
    made = {
        client.upload_map(json.dumps(MAP | {"linears": {f"linear{n}": "3"}}).encode()).id
        for n in range(5)
    }
    assert made <= {record.id for record in client.maps()}
    assert len(made) == 5


def test_same_key_gives_the_same_job(client: Client) -> None:
    first = client.submit(spec_json(), idempotency_key="client-key")
    assert client.submit(spec_json(), idempotency_key="client-key").id == first.id
    assert client.submit(spec_json()).id != first.id


def test_wait_returns_the_finished_job_and_every_event_once(client: Client, stack: Stack) -> None:
    job = stack.running()
    seen: list[EventView] = []

    def finish_when_heard(event: EventView) -> None:
        seen.append(event)
        if event.seq == 2:
            assert stack.leases.fail(job.id, job.token, NumericalError("singular"))

    with pytest.raises(JobFailed) as failed:
        client.wait(job.id, on_event=finish_when_heard)
    assert failed.value.code == "numerical"
    assert "singular" in failed.value.message
    assert type(failed.value.error) is NumericalError
    assert failed.value.error is failed.value.__cause__
    assert [event.seq for event in seen] == [1, 2, 3]
    assert client.wait(stack.succeeded().id).result == {"code_bits": 3.0}


def test_wait_tells_cancelled_and_timeout_apart(client: Client, stack: Stack) -> None:
    queued = stack.queued()
    with pytest.raises(WaitTimeout) as late:
        client.wait(queued.id, timeout=0.1)
    assert late.value.job.state == "queued"
    stack.context.jobs.request_cancel(queued.id)
    with pytest.raises(JobCancelled):
        client.wait(queued.id, timeout=5)


def test_outputs_come_back_typed(client: Client, stack: Stack, tmp_path: Path) -> None:
    job = stack.succeeded(b"payload")
    assert client.bit_width_map(job.id).model_dump(mode="json") == MAP
    assert client.report(job.id) == REPORT
    done = client.download(job.id, tmp_path / "out", include=("*.safetensors",))
    assert done.fetched == ("model.safetensors",)
    assert (tmp_path / "out/model.safetensors").read_bytes() == b"payload"
    assert client.upload_map(b'{"linears": {"a": "33"}}').histogram == {"3": 2}


def test_log_is_followed_to_its_end(client: Client, stack: Stack) -> None:
    job = stack.running()
    stack.leases.append_log(job.id, job.token, b"one\n", limit=1 << 20)
    pieces = client.logs(job.id, follow=True)
    assert next(pieces) == "one\n"
    stack.leases.append_log(job.id, job.token, b"two\n", limit=1 << 20)
    assert stack.leases.fail(job.id, job.token, NumericalError("no luck"))
    assert "".join(pieces) == "two\n"


class Flaky:
    """Answers the given statuses first, then as a service would."""

    def __init__(self, statuses: list[int]) -> None:
        self.statuses = statuses
        self.keys: list[str | None] = []
        self.app = FastAPI()
        self.app.post("/v1/jobs")(self.answer)
        self.app.get("/v1/sweeps/{sweep_id}/events")(self.answer)

    def answer(self, request: Request) -> Response:
        self.keys.append(request.headers.get("idempotency-key"))
        return Response(status_code=self.statuses.pop(0), headers={"Retry-After": "7"})


def test_busy_service_is_asked_again_with_the_same_key() -> None:
    flaky = Flaky([503, 429, 502, 504, 401])
    waits: list[float] = []
    with (
        serve(flaky.app) as url,
        Client(url, sleep=waits.append) as client,
        pytest.raises(Unauthorized),
    ):
        client.submit(spec_json())
    assert len(set(flaky.keys)) == 1
    assert flaky.keys[0]
    assert waits == [7.0] * 4


def test_stream_that_breaks_is_continued_without_a_gap(stack: Stack) -> None:
    """A proxy that cuts every stream after one event."""
    job = stack.succeeded()
    seen: list[int] = []
    with serve(_cutting_proxy(stack)) as url, Client(url, sleep=lambda _: None) as client:
        for event in client.events(job.id):
            seen.append(event.seq)
    assert seen == [1, 2, 3, 4]


def test_a_sweeps_stream_that_breaks_is_continued_without_a_gap(stack: Stack) -> None:
    sweep = stack.sweep(seed=[0, 1])
    for job in stack.context.sweeps.cells(sweep).values():
        stack.context.jobs.request_cancel(job.id)
    seen: list[tuple[int, int]] = []
    with serve(_cutting_proxy(stack)) as url, Client(url, sleep=lambda _: None) as client:
        for event in client.sweep_events(sweep):
            seen.append((event.cell, event.seq))
            assert len(seen) <= 4
    assert sorted(seen) == [(1, 1), (1, 2), (2, 1), (2, 2)]


def test_a_sweeps_stream_that_nobody_answers_ends_when_patience_does() -> None:
    flaky = Flaky([503] * 100)
    waits: list[float] = []
    with (
        serve(flaky.app) as url,
        Client(url, patience=30.0, sleep=waits.append) as client,
        pytest.raises(Unreachable, match="answers 503"),
    ):
        list(client.sweep_events("s"))
    assert waits == [7.0] * 4


def _cutting_proxy(stack: Stack) -> FastAPI:
    app = FastAPI()

    @app.get("/{path:path}")
    def forward(path: str, request: Request) -> Response:
        headers = {k: v for k, v in request.headers.items() if k in ("accept", "last-event-id")}
        query = dict(request.query_params)
        answer = httpx2.get(f"{stack.url}/{path}", headers=headers, params=query)
        content = answer.content
        if "text/event-stream" in headers["accept"]:
            content = content[: content.index(b"\n\n") + 2]
        elif query.get("limit"):
            answer = httpx2.get(f"{stack.url}/{path}", params=query | {"limit": "1"})
            content = answer.content
        return Response(content, answer.status_code, media_type=answer.headers["content-type"])

    return app


def test_silent_address_is_unreachable() -> None:
    with (
        Client("http://127.0.0.1:9", tries=2, sleep=lambda _: None) as client,
        pytest.raises(Unreachable, match="bitmill serve"),
    ):
        client.list_jobs()


class Restart:
    """A service that goes away after the first event and comes back after minutes of waiting."""

    def __init__(self, stack: Stack, job: JobRecord, away_s: float = 240.0) -> None:
        self.stack, self.job, self.away_s = stack, job, away_s
        self.target = httpx2.URL(stack.url).port
        assert self.target is not None
        self.proxy = TcpProxy(self.target)
        self.port, self.up = self.proxy.port, True
        self.waited = 0.0
        self.told: list[str] = []
        self.client = Client(
            f"http://127.0.0.1:{self.port}",
            tries=3,
            patience=600.0,
            sleep=self.sleep,
            on_wait=self.told.append,
        )

    def stop(self) -> None:
        self.proxy.close()
        self.up = False

    def stop_at_first(self, event: EventView) -> None:
        if event.seq == 1:
            self.stop()

    def sleep(self, seconds: float) -> None:
        self.waited += seconds
        if not self.up and self.waited > self.away_s:
            self.stack.finish(self.job)
            assert self.target is not None
            self.proxy, self.up = TcpProxy(self.target, self.port), True


@pytest.fixture
def restart(stack: Stack) -> Iterator[Restart]:
    found = Restart(stack, stack.running())
    with found.client:
        yield found
    found.stop()


def test_wait_outlives_a_restart(restart: Restart) -> None:
    seen: list[int] = []

    def on_event(event: EventView) -> None:
        seen.append(event.seq)
        restart.stop_at_first(event)

    job = restart.client.wait(restart.job.id, on_event=on_event)
    assert (job.state, seen) == ("succeeded", [1, 2, 3, 4])
    assert restart.waited > 240
    assert restart.told
    assert all("trying again for" in text for text in restart.told)


def test_wait_with_a_timeout_outlives_a_restart(restart: Restart) -> None:
    found = restart.client.wait(restart.job.id, on_event=restart.stop_at_first, timeout=500)
    assert found.state == "succeeded"


def test_wait_started_while_the_service_is_away_finds_it(restart: Restart) -> None:
    restart.stop()
    assert restart.client.wait(restart.job.id).state == "succeeded"


def test_followed_log_outlives_a_restart(restart: Restart) -> None:
    leases, job = restart.stack.leases, restart.job
    leases.append_log(job.id, job.token, b"one\n", limit=1 << 20)
    pieces = restart.client.logs(job.id, follow=True)
    assert next(pieces) == "one\n"
    restart.stop()
    assert "".join(pieces) == ""


def test_download_that_was_listing_outlives_a_restart(restart: Restart, tmp_path: Path) -> None:
    restart.stop()
    done = restart.client.download(restart.job.id, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == b"weights"
    assert "model.safetensors" in done.fetched


def test_single_calls_give_up_soon(restart: Restart) -> None:
    restart.stop()
    calls: list[Callable[[], object]] = [
        lambda: restart.client.get(restart.job.id),
        lambda: restart.client.submit(spec_json()),
        lambda: restart.client.cancel(restart.job.id),
        lambda: restart.client.files(restart.job.id),
        lambda: next(restart.client.logs(restart.job.id)),
        restart.client.list_jobs,
    ]
    for call in calls:
        with pytest.raises(Unreachable):
            call()
    assert restart.waited < 10


def test_patience_has_an_end(restart: Restart) -> None:
    restart.away_s = 1e9
    restart.stop()
    with pytest.raises(Unreachable):
        restart.client.wait(restart.job.id)
    assert 590 < restart.waited < 610


def test_an_address_that_cannot_be_called_is_no_reason_to_wait() -> None:
    for url in ("ftp://127.0.0.1/", "127.0.0.1:8737", "http://127.0.0.1:99999999", "http://", "x"):
        with pytest.raises(Unreachable, match="no address of a service"):
            Client(url)


def test_another_program_behind_the_address_is_told() -> None:
    app = FastAPI()
    app.get("/v1/jobs")(lambda: Response("<html>", media_type="text/html"))
    app.get("/v1/jobs/{job}")(lambda job: {"hello": job})
    app.get("/v1/profiles")(lambda: RedirectResponse("https://example.com:444/v1/profiles"))
    with serve(app) as url, Client(url) as client:
        for call in (client.list_jobs, lambda: client.get("x")):
            with pytest.raises(ServiceError, match="Bitmill service behind") as odd:
                call()
            assert odd.value.code == "unexpected_answer"
        with pytest.raises(ServiceError, match="BITMILL_URL") as moved:
            client.profiles()
        assert "https://example.com:444:" in moved.value.message


def test_client_is_usable_from_several_threads(client: Client) -> None:
    found: list[str] = []

    def submit() -> None:
        found.append(client.submit(spec_json()).id)

    threads = [threading.Thread(target=submit) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 8
