"""Cursors, limits and offsets that no page gave are refused, not taken for the beginning or end."""

from __future__ import annotations

import httpx2
import pytest

from bitmill_workers.store.records import new_id
from finished import Stack

LISTS = ("/v1/jobs", "/v1/sweeps", "/v1/profiles", "/v1/bit-width-maps")
STREAM = {"Accept": "text/event-stream"}


def refused(answer: httpx2.Response, param: str) -> str:
    body = answer.json()
    assert (answer.status_code, body["code"], body["param"]) == (422, "invalid_request", param)
    return str(body["detail"])


@pytest.mark.parametrize("path", [*LISTS, *(f"/ui/{p.rpartition('/')[2]}" for p in LISTS)])
@pytest.mark.parametrize("after", ["garbage", "", "0", "z" * 64, "../x", "a b", "\0"])
def test_a_cursor_that_no_page_gave_is_refused(http: httpx2.Client, path: str, after: str) -> None:
    answer = http.get(path, params={"after": after})
    assert answer.status_code == 422
    if path in LISTS:
        assert repr(after) in refused(answer, "after")


@pytest.mark.parametrize("path", LISTS)
@pytest.mark.parametrize("limit", ["0", "-1", "201", "9" * 30, "1.5", "x", ""])
def test_a_limit_that_no_page_has_is_refused(http: httpx2.Client, path: str, limit: str) -> None:
    refused(http.get(path, params={"limit": limit}), "limit")


def test_a_page_goes_on_behind_what_was_deleted(http: httpx2.Client, stack: Stack) -> None:
    first, last = stack.failed(), stack.failed()
    stack.context.jobs.delete(last.id)
    page = http.get("/v1/jobs", params={"after": last.id}).json()
    assert first.id in [job["id"] for job in page["jobs"]]
    assert http.get("/v1/sweeps", params={"after": new_id()}).status_code == 200
    for path in LISTS[2:]:
        assert http.get(path, params={"after": "0" * 32}).status_code == 200


@pytest.mark.parametrize("number", ["x", "-1", "1.5", "", "9" * 5000, "3"])
def test_an_event_that_the_job_does_not_have_is_refused(
    http: httpx2.Client, stack: Stack, number: str
) -> None:
    job = stack.running()
    path = f"/v1/jobs/{job.id}/events"
    told = refused(http.get(path, params={"after": number}), "after")
    assert number != "3" or "the last event of job" in told
    refused(http.get(path, params={"after": number}, headers=STREAM), "after")
    seen = {"Last-Event-ID": number}
    param = "after" if number == "3" else "last-event-id"
    refused(http.get(path, headers=STREAM | seen), param)
    page = http.get(path, params={"after": 2}).json()
    assert (page["events"], page["next_after"], page["end"]) == ([], 2, False)


@pytest.mark.parametrize("limit", ["0", "-1", "1001", "9" * 30])
def test_a_limit_of_events_is_within_a_page(http: httpx2.Client, stack: Stack, limit: str) -> None:
    path = f"/v1/jobs/{stack.running().id}/events"
    refused(http.get(path, params={"limit": limit}), "limit")


@pytest.mark.parametrize("text", ["garbage", "1", "abcdefgh.", "abcdefgh.1~", "abcdefgh.x"])
def test_a_position_that_no_stream_gave_is_refused(
    http: httpx2.Client, stack: Stack, text: str
) -> None:
    path = f"/v1/sweeps/{stack.sweep(seed=[1])}/events"
    refused(http.get(path, params={"after": text}), "after")
    refused(http.get(path, headers={"Last-Event-ID": text}), "last-event-id")


def test_an_offset_past_the_log_is_refused(http: httpx2.Client, stack: Stack) -> None:
    job = stack.running()
    assert stack.leases.append_log(job.id, job.token, b"four", limit=100)
    path = f"/v1/jobs/{job.id}/logs"
    assert http.get(path, params={"offset": 4}).json()["next_offset"] == 4
    assert "4 bytes" in refused(http.get(path, params={"offset": 5}), "offset")
    for offset in ("-1", "x", "9" * 30):
        refused(http.get(path, params={"offset": offset}), "offset")
