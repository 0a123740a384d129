"""A job's events as a stream (server-sent events) beside the JSON page of the same route.

Each event's `id:` is its number, its data the same JSON as in the page; a client that comes back
with `Last-Event-ID` (or `?after=`) misses nothing. The last event of a finished job is followed by
`event: end`. The database is the truth, so any replica can serve any stream: it is asked every
`event_poll_s`, and less often while nothing comes. FastAPI sends a comment every 15 s to keep
proxies from closing a silent stream.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator

from fastapi.routing import APIRoute
from fastapi.sse import ServerSentEvent
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.routing import Match
from starlette.types import Scope

from bitmill_service.api.context import ContextDep, PrincipalDep
from bitmill_service.api.views import event_view
from bitmill_service.http.problems import ProblemError
from bitmill_workers.errors import JobNotFound
from bitmill_workers.store.jobs import JobStore
from bitmill_workers.store.records import Event

_PAGE = 500
_LONGEST = 8
"""How much longer a stream may wait than at first where nothing comes."""
_NUMBER = re.compile(r"[0-9]{1,18}")


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


def first_event(after: int, last_event_id: str | None) -> int:
    """Number after which to go on: `Last-Event-ID` where it is a number, else `after`."""
    if last_event_id is not None and _NUMBER.fullmatch(last_event_id):
        return int(last_event_id)
    return after


async def job_events(
    store: JobStore, job_id: str, after: int, poll_s: float, stopping: asyncio.Event
) -> AsyncIterator[ServerSentEvent]:
    """Events after `after` until the job has finished, is deleted, or the server stops."""
    pause = poll_s
    while not stopping.is_set():
        try:
            events, finished = await run_in_threadpool(_read, store, job_id, after)
        except JobNotFound:
            return
        for event in events:
            after = event.seq
            data = event_view(event).model_dump_json()
            yield ServerSentEvent(raw_data=data, event=event.kind, id=str(event.seq))
        if finished and not events:
            yield ServerSentEvent(raw_data="{}", event="end")
            return
        if events:
            pause = poll_s
        else:
            await _pause(stopping, pause)
            pause = min(1.25 * pause, _LONGEST * poll_s)


def _read(store: JobStore, job_id: str, after: int) -> tuple[tuple[Event, ...], bool]:
    """Events, and whether none will follow: the state is read first, so none can slip between."""
    last, finished = store.last_event(job_id)
    return (store.events(job_id, after=after, limit=_PAGE) if last > after else ()), finished


async def _pause(stopping: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(stopping.wait(), seconds)
    except TimeoutError:
        return
