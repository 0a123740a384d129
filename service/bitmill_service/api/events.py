"""Events of a job or of all jobs of a sweep as a stream (server-sent events).

A job's stream lies beside the JSON page of the same route: each event's `id:` is its number, its
data the same JSON as in the page. A sweep's `id:` says for every job how far the stream has come
(`Position`). A client that comes back with `Last-Event-ID` (or `?after=`) misses nothing. Where all
jobs have finished, the last event is followed by `event: end`. The database is the truth, so any
replica can serve any stream: it is asked every `event_poll_s`, and less often while nothing comes.
FastAPI sends a comment every 15 s to keep proxies from closing a silent stream.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from heapq import merge

from fastapi.routing import APIRoute
from fastapi.sse import ServerSentEvent
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.routing import Match
from starlette.types import Scope

from bitmill.errors import InputError
from bitmill_service.api.context import ContextDep, PrincipalDep
from bitmill_service.api.views import event_view
from bitmill_service.http.problems import ProblemError
from bitmill_service.schemas import EventView, SweepEventView
from bitmill_workers.errors import JobNotFound
from bitmill_workers.store.db import DATABASE_ERRORS
from bitmill_workers.store.jobs import JobStore
from bitmill_workers.store.records import CellEnd, JobRecord
from bitmill_workers.store.sweeps import SweepStore

_log = logging.getLogger(__name__)
_PAGE = 500
_JOBS = 16
"""Of a sweep, from which one look takes new events."""
_LONGEST = 8
"""How much longer a stream may wait than at first where nothing comes."""


def wants_stream(headers: Headers) -> bool:
    """Whether `Accept` names event streams."""
    types = headers.get("accept", "").split(",")
    return any(t.partition(";")[0].strip() == "text/event-stream" for t in types)


class EventStreamRoute(APIRoute):
    """A route that exists only for requests that accept event streams."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """No match where the client does not ask for a stream, so the JSON route answers."""
        if scope["type"] == "http" and not wants_stream(Headers(scope=scope)):
            return Match.NONE, {}
        return super().matches(scope)


async def stream_slot(context: ContextDep, caller: PrincipalDep) -> AsyncIterator[None]:
    """Count a stream while it is open; 429 `too_many_streams` where half of all connections are.

    Streams last as long as jobs, so without a limit they could keep every other request out. A
    tenant may have a quarter of them.
    """
    mine, most = caller.tenant, max(1, context.max_streams // 4)
    limits = [(context.streams.total(), context.max_streams)]
    if caller.key_id is not None:
        limits.append((context.streams[mine], most))
    for count, limit in limits:
        if count >= limit:
            raise ProblemError(
                "too_many_streams",
                f"{count} event streams are open, at most {limit} may be",
                headers={"Retry-After": "5"},
            )
    context.streams[mine] += 1
    try:
        yield
    finally:
        context.streams[mine] -= 1


def check_seen(job: JobRecord, after: int) -> int:
    """The number of an event that a client has seen; raises `InputError` where the job has none."""
    last = job.next_seq - 1
    if after > last:
        raise InputError(
            f"after={after}: the last event of job {job.id} is {last}, so it is of another job",
            code="invalid_request",
            param="after",
        )
    return after


class Position:
    """Number of the last event seen of every job of a sweep.

    As text, "0a1b2c3d.12~4e5f6a7b.3": the last 8 characters of each job's id, which are random, and
    the number. A job that it does not name counts from its beginning.
    """

    PATTERN = r"^([0-9A-Za-z_-]{8}\.[0-9]{1,18}(~[0-9A-Za-z_-]{8}\.[0-9]{1,18})*)?$"

    def __init__(self, text: str = "") -> None:
        """text: of the pattern."""
        parts = text.split("~") if text else ()
        self._seen = {job: int(seq) for job, _, seq in (part.partition(".") for part in parts)}

    def __getitem__(self, job_id: str) -> int:
        return self._seen.get(job_id[-8:], 0)

    def __setitem__(self, job_id: str, seq: int) -> None:
        self._seen[job_id[-8:]] = seq

    def __str__(self) -> str:
        return "~".join(f"{job}.{seq}" for job, seq in self._seen.items())

    @classmethod
    def now(cls, ends: Iterable[CellEnd]) -> Position:
        """Behind everything that has happened."""
        found = cls()
        for end in ends:
            found[end.job_id] = end.last
        return found


def job_events(
    store: JobStore, job_id: str, after: int, poll_s: float, stopping: asyncio.Event
) -> AsyncIterator[ServerSentEvent]:
    """Events after `after` until the job has finished, is deleted, or the server stops."""

    def read() -> tuple[list[ServerSentEvent], bool]:
        nonlocal after
        last, finished = store.last_event(job_id)
        found = store.events(job_id, after=after, limit=_PAGE) if last > after else ()
        after = found[-1].seq if found else after
        return [_sent(event_view(event), str(event.seq)) for event in found], finished

    return _follow(read, poll_s, stopping)


def sweep_events(
    sweeps: SweepStore, sweep_id: str, seen: Position, poll_s: float, stopping: asyncio.Event
) -> AsyncIterator[ServerSentEvent]:
    """Events of all jobs after `seen`, until all have finished or the server stops."""

    def read() -> tuple[list[ServerSentEvent], bool]:
        ends = sweeps.ends(sweep_id)
        new = [end for end in ends if end.last > seen[end.job_id]][:_JOBS]
        found = [
            [(end, event) for event in sweeps.jobs.events(end.job_id, after=seen[end.job_id])]
            for end in new
        ]
        sent = []
        for end, event in merge(*found, key=lambda one: one[1].time):
            seen[end.job_id] = event.seq
            told = event_view(event).model_dump() | {"cell": end.cell, "job_id": end.job_id}
            sent.append(_sent(SweepEventView(**told), str(seen)))
        return sent, all(end.finished for end in ends)

    return _follow(read, poll_s, stopping)


def _sent(view: EventView, number: str) -> ServerSentEvent:
    return ServerSentEvent(raw_data=view.model_dump_json(), event=view.kind, id=number)


async def _follow(
    read: Callable[[], tuple[list[ServerSentEvent], bool]], poll_s: float, stopping: asyncio.Event
) -> AsyncIterator[ServerSentEvent]:
    """What `read` finds, again and again.

    It says whether nothing will follow: it looks at states before events, so none can slip between.
    A stream that ends without `event: end`, as where the database is away, is asked for again.
    """
    pause = poll_s
    while not stopping.is_set():
        try:
            events, finished = await run_in_threadpool(read)
        except JobNotFound:
            return
        except DATABASE_ERRORS as error:
            _log.warning("a stream of events ends, the job store failed: %s", error)
            return
        for event in events:
            yield event
        if finished and not events:
            yield ServerSentEvent(raw_data="{}", event="end")
            return
        if events:
            pause = poll_s
        else:
            await _pause(stopping, pause)
            pause = min(1.25 * pause, _LONGEST * poll_s)


async def _pause(stopping: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(stopping.wait(), seconds)
    except TimeoutError:
        return
