"""The client for programs that use asyncio.

    async with AsyncClient("http://127.0.0.1:8737") as client:
        job = await client.submit({"model": {...}, "budget": {"code_bits": 3}})
        async for event in client.events(job.id):
            print(event.kind)

Every call is that of `Client`, in a thread: one set of rules for retries, resuming and errors. A
cancelled call stops waiting at once; what it has already asked the service for is not taken back.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from bitmill_service.client.client import Client
from bitmill_service.schemas import EventView, SweepEventView

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _in_thread(
    call: Callable[Concatenate[Client, _P], _R],
) -> Callable[Concatenate[AsyncClient, _P], Coroutine[Any, Any, _R]]:
    async def threaded(self: AsyncClient, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        return await asyncio.to_thread(call, self.client, *args, **kwargs)

    threaded.__doc__ = call.__doc__
    return threaded


class AsyncClient:
    """One service; takes what `Client` takes. `client` is the one that does the work."""

    def __init__(self, url: str | None = None, **options: Any) -> None:
        self.client = Client(url, **options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def events(self, job_id: str, *, after: int = 0) -> AsyncIterator[EventView]:
        """All events from `after` on, as they come, until the job has finished."""
        found = self.client.events(job_id, after=after)
        while (event := await asyncio.to_thread(next, found, None)) is not None:
            yield event

    async def sweep_events(self, sweep_id: str) -> AsyncIterator[SweepEventView]:
        """Events of all jobs of a sweep, as they come, until all have finished."""
        found = self.client.sweep_events(sweep_id)
        while (event := await asyncio.to_thread(next, found, None)) is not None:
            yield event

    close = _in_thread(Client.close)
    submit = _in_thread(Client.submit)
    plan = _in_thread(Client.plan)
    get = _in_thread(Client.get)
    list_jobs = _in_thread(Client.list_jobs)
    cancel = _in_thread(Client.cancel)
    retry = _in_thread(Client.retry)
    plan_export = _in_thread(Client.plan_export)
    export = _in_thread(Client.export)
    push = _in_thread(Client.push)
    pin = _in_thread(Client.pin)
    delete = _in_thread(Client.delete)
    submit_sweep = _in_thread(Client.submit_sweep)
    sweep = _in_thread(Client.sweep)
    sweeps = _in_thread(Client.sweeps)
    wait_sweep = _in_thread(Client.wait_sweep)
    cancel_sweep = _in_thread(Client.cancel_sweep)
    delete_sweep = _in_thread(Client.delete_sweep)
    sweep_table = _in_thread(Client.sweep_table)
    sweep_plot = _in_thread(Client.sweep_plot)
    event_page = _in_thread(Client.event_page)
    wait = _in_thread(Client.wait)
    log_page = _in_thread(Client.log_page)
    bit_width_map = _in_thread(Client.bit_width_map)
    report = _in_thread(Client.report)
    files = _in_thread(Client.files)
    download = _in_thread(Client.download)
    upload = _in_thread(Client.upload)
    uploads = _in_thread(Client.uploads)
    delete_upload = _in_thread(Client.delete_upload)
    profiles = _in_thread(Client.profiles)
    profile = _in_thread(Client.profile)
    allocate = _in_thread(Client.allocate)
    maps = _in_thread(Client.maps)
    stored_map = _in_thread(Client.stored_map)
    upload_map = _in_thread(Client.upload_map)
    ready = _in_thread(Client.ready)
