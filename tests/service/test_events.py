"""The event stream against the JSON page, over real HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.datastructures import Headers

from bitmill.errors import NumericalError
from bitmill_service.api.events import wants_stream
from bitmill_service.main import create_app
from bitmill_service.settings import ServiceSettings
from bitmill_workers.store.migrate import upgrade
from finished import Stack
from serving import serve
from stores import wait_for

END_S = 20.0
SILENT_S = 5.0
"""Less than the 15 s after which a silent stream sends a comment."""

OnEvent = Callable[[list[httpx2.ServerSentEvent]], None]


def follow(
    http: httpx2.Client,
    path: str,
    headers: dict[str, str],
    on_event: OnEvent = lambda heard: None,
) -> list[httpx2.ServerSentEvent]:
    """All events of a stream; fails where it falls silent or does not end in time.

    on_event: told all events so far whenever one has come.
    """
    heard: list[httpx2.ServerSentEvent] = []
    latest = time.monotonic() + END_S
    with http.stream("GET", path, headers=headers, timeout=SILENT_S) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        for event in httpx2.EventSource(response):
            heard.append(event)
            assert time.monotonic() < latest, f"no end after {END_S:g} s, {len(heard)} events"
            on_event(heard)
    return heard


def stream(
    http: httpx2.Client, job_id: str, on_event: OnEvent = lambda heard: None, **headers: str
) -> list[httpx2.ServerSentEvent]:
    accept = {"Accept": "text/event-stream"} | headers
    return follow(http, f"/v1/jobs/{job_id}/events", accept, on_event)


def pages(http: httpx2.Client, job_id: str, limit: int = 2) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    after, end = 0, False
    while not end:
        query = {"after": after, "limit": limit}
        page = http.get(f"/v1/jobs/{job_id}/events", params=query).json()
        found += page["events"]
        after, end = page["next_after"], page["end"]
    return found


def test_stream_replays_exactly_what_the_pages_hold(http: httpx2.Client, stack: Stack) -> None:
    job = stack.succeeded()
    *events, end = stream(http, job.id)
    assert end.event == "end"
    assert [event.json() for event in events] == pages(http, job.id)
    assert [int(event.id) for event in events] == list(range(1, len(events) + 1))
    assert [event.event for event in events] == ["state"] * 4


def test_stream_goes_on_after_the_last_event_id(http: httpx2.Client, stack: Stack) -> None:
    job = stack.succeeded()
    everything = [event.id for event in stream(http, job.id)]
    rest = [event.id for event in stream(http, job.id, **{"Last-Event-ID": "2"})]
    assert rest == everything[2:]
    last = str(len(everything) - 1)
    assert [e.event for e in stream(http, job.id, **{"Last-Event-ID": last})] == ["end"]


def test_stream_shows_events_as_they_happen(http: httpx2.Client, stack: Stack) -> None:
    job = stack.running()

    def finish(heard: list[httpx2.ServerSentEvent]) -> None:
        if heard[-1].id != "2":
            return
        progress = {"stage": "refine", "done": 1, "total": 2, "unit": "block"}
        assert stack.leases.report(job.id, job.token, [("progress", progress)])
        assert stack.leases.fail(job.id, job.token, NumericalError("no luck"))

    kinds = [event.event for event in stream(http, job.id, finish)]
    assert kinds == ["state", "state", "progress", "state", "end"]


def test_unfinished_job_has_an_open_end(http: httpx2.Client, stack: Stack) -> None:
    page = http.get(f"/v1/jobs/{stack.running().id}/events").json()
    assert (page["end"], page["next_after"]) == (False, 2)


def test_unknown_job_is_a_problem_in_both_forms(http: httpx2.Client) -> None:
    for accept in ("application/json", "text/event-stream"):
        answer = http.get("/v1/jobs/none/events", headers={"Accept": accept})
        assert (answer.status_code, answer.json()["code"]) == (404, "job_not_found")


def test_deleted_job_ends_its_stream(http: httpx2.Client, stack: Stack) -> None:
    job = stack.running()
    accept = {"Accept": "text/event-stream"}
    path = f"/v1/jobs/{job.id}/events"
    with http.stream("GET", path, headers=accept, timeout=SILENT_S) as response:
        events = iter(httpx2.EventSource(response))
        assert next(events).event == "state"
        assert stack.leases.fail(job.id, job.token, NumericalError("no luck"))
        stack.context.jobs.delete(job.id)
        assert all(event.event in ("state", "end") for event in events)


def test_a_stream_ends_where_the_database_is_gone_without_a_stack_trace(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(ServiceSettings(data=tmp_path, event_poll_s=0.05))
    context = app.state.context
    upgrade(context.database)
    with serve(app) as url, httpx2.Client(base_url=url) as http:
        job = Stack(url, context).running()
        accept = {"Accept": "text/event-stream"}
        path = f"/v1/jobs/{job.id}/events"
        with http.stream("GET", path, headers=accept, timeout=SILENT_S) as response:
            events = iter(httpx2.EventSource(response))
            assert [next(events).id for _ in range(2)] == ["1", "2"]
            with context.database.write() as conn:
                conn.exec_driver_sql("ALTER TABLE jobs RENAME TO gone")
            assert list(events) == []
        wait_for(lambda: context.streams.total() == 0, "the place of the stream")
    assert not [record for record in caplog.records if record.exc_info]


def test_streams_have_a_limit_and_give_their_place_back(
    http: httpx2.Client, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = stack.running()
    accept = {"Accept": "text/event-stream"}
    wait_for(lambda: stack.context.streams.total() == 0, "the end of other streams")
    monkeypatch.setattr(stack.context, "max_streams", 1)
    path = f"/v1/jobs/{job.id}/events"
    with http.stream("GET", path, headers=accept, timeout=SILENT_S) as response:
        events = iter(httpx2.EventSource(response))
        assert next(events).event == "state"
        refused = http.get(path, headers=accept)
        assert (refused.status_code, refused.json()["code"]) == (429, "too_many_streams")
        assert refused.headers["retry-after"] == "5"
        assert http.get(path).json()["events"]
    wait_for(lambda: stack.context.streams.total() == 0, "the place of the closed stream")
    assert stack.leases.fail(job.id, job.token, NumericalError("no luck"))
    for _ in range(2):
        assert stream(http, job.id)[-1].event == "end"
        wait_for(lambda: stack.context.streams.total() == 0, "the place of the ended stream")


def test_accept_header_chooses_the_form() -> None:
    assert wants_stream(Headers({"accept": "text/html, text/event-stream;q=0.9"}))
    assert not wants_stream(Headers({"accept": "application/json"}))
    assert not wants_stream(Headers({}))


def sweep_stream(
    http: httpx2.Client, sweep: str, on_event: OnEvent = lambda heard: None, **headers: str
) -> list[httpx2.ServerSentEvent]:
    return follow(http, f"/v1/sweeps/{sweep}/events", headers, on_event)


def test_a_sweeps_stream_is_that_of_all_of_its_jobs(http: httpx2.Client, stack: Stack) -> None:
    sweep = stack.sweep(seed=[0, 1, 2])
    jobs = [job.id for job in stack.context.sweeps.cells(sweep).values()]

    def finish(heard: list[httpx2.ServerSentEvent]) -> None:
        if len(heard) == len(jobs):
            for job_id in jobs:
                stack.context.jobs.request_cancel(job_id)

    *events, end = sweep_stream(http, sweep, finish)
    assert end.event == "end"
    for number, job_id in enumerate(jobs, 1):
        mine = [event.json() for event in events if event.json()["job_id"] == job_id]
        told = {"cell": number, "job_id": job_id}
        assert mine == [page | told for page in pages(http, job_id)]
    # From any event on, exactly the rest comes again, whatever job it is of.
    for place in range(len(events)):
        rest = sweep_stream(http, sweep, **{"Last-Event-ID": events[place].id})
        told = [event.data for event in rest[:-1]]
        assert sorted(told) == sorted(event.data for event in events[place + 1 :])


def test_a_retried_cell_goes_on_in_its_sweeps_stream(http: httpx2.Client, stack: Stack) -> None:
    sweep = stack.sweep(seed=[0, 1])
    first, second = (job.id for job in stack.context.sweeps.cells(sweep).values())
    for job_id in (first, second):
        stack.context.jobs.request_cancel(job_id)
    last = sweep_stream(http, sweep)[-2].id
    again = http.post(f"/v1/jobs/{first}/retry").json()["id"]
    stack.context.jobs.request_cancel(again)
    rest = sweep_stream(http, sweep, **{"Last-Event-ID": last})[:-1]
    assert {(event.json()["cell"], event.json()["job_id"]) for event in rest} == {(1, again)}
    http.delete(f"/v1/jobs/{second}")
    assert len(sweep_stream(http, sweep, **{"Last-Event-ID": last})) == len(rest) + 1
    answer = http.get(f"/v1/sweeps/{sweep}/events", params={"after": "nonsense"})
    assert answer.status_code == 422
    missing = http.get("/v1/sweeps/absent/events")
    assert (missing.status_code, missing.json()["code"]) == (404, "sweep_not_found")
