"""`bitmill top`: what a service does now, renewed on a terminal until Ctrl-C."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bitmill_service.cli.jobs import budget_text, model_text
from bitmill_service.cli.output import JsonFlag, UrlOption, console, open_client, print_json
from bitmill_service.cli.progress import duration
from bitmill_service.client.client import Client
from bitmill_service.client.errors import Unauthorized
from bitmill_service.schemas import JobView, WorkersView, WorkerView
from bitmill_service.units import format_size

_LIVE = ("running", "cancelling", "finalizing")
_WAITING = 20
"""Queued jobs that are shown; more are counted."""
_COUNTED = 200


@dataclass(frozen=True)
class Snapshot:
    """Live jobs, the first that wait, and workers where the key may see them.

    more: whether there are more queued jobs than `queued` names. refused: why no workers.
    """

    live: list[JobView]
    queued: list[JobView]
    more: bool
    workers: WorkersView | None
    refused: str | None = None

    @classmethod
    def of(cls, client: Client) -> Snapshot:
        """What the service says now."""
        live = [job for state in _LIVE for job in client.list_jobs(state=state, limit=200).jobs]
        page = client.list_jobs(state="queued", limit=_COUNTED)
        try:
            workers, refused = client.workers(), None
        except Unauthorized as error:
            workers, refused = None, error.message
        return cls(live, page.jobs, page.next is not None, workers, refused)


def top(
    *,
    interval: Annotated[
        float, typer.Option(min=0.5, metavar="SECONDS", help="Time between two looks.")
    ] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and end.")] = False,
    url: UrlOption = None,
    json: JsonFlag = False,
) -> None:
    """Show live jobs, waiting jobs and workers, again and again on a terminal.

    Into a pipe or a file, and with --once or --json, once. Example: bitmill top --interval 5
    """
    with open_client(url) as client:
        found = Snapshot.of(client)
        if json:
            print_json(_as_json(found))
            return
        screen = console()
        if once or not sys.stdout.isatty():
            screen.print(picture(found, client.url))
            return
        with Live(picture(found, client.url), console=screen, screen=True) as live:
            while True:
                time.sleep(interval)
                live.update(picture(Snapshot.of(client), client.url), refresh=True)


def picture(found: Snapshot, url: str, now: datetime | None = None) -> Group:
    """Everything as tables, in the width of the terminal."""
    now = now or datetime.now(UTC)
    waiting = f"{len(found.queued)}{'+' if found.more else ''}"
    head = Text(f"{url}  {now.astimezone():%H:%M:%S}  {len(found.live)} live, {waiting} queued")
    by_job = {w.job_id: w.name for w in (found.workers.workers if found.workers else ())}
    parts: list[Text | Table] = [head, Text("")]
    rows = [
        (*_named(job), _progress(job), _left(job, now), by_job.get(job.id, "-"))
        for job in found.live
    ]
    parts.append(_table(("job", "state", "model", "budget", "stage", "left", "worker"), rows))
    if found.queued:
        # Newest first in the list: those at its end have waited longest.
        oldest = found.queued[::-1][:_WAITING]
        shown = [(*_named(job), duration((now - job.created_at).total_seconds())) for job in oldest]
        parts += [Text(""), _table(("job", "state", "model", "budget", "waits"), shown)]
    parts.append(Text(""))
    if found.workers is None:
        parts.append(Text(f"workers: {found.refused}"))
        return Group(*parts)
    workers = [
        (
            w.name,
            "drains" if w.drains else "works" if w.job_id else "idle",
            w.device,
            memory_text(w),
            ",".join(w.queues),
        )
        for w in found.workers.workers
    ]
    parts.append(_table(("worker", "state", "device", "device memory", "queues"), workers))
    served = {name for w in found.workers.workers for name in w.queues}
    queues = [
        (q.name, str(q.queued), str(q.running), "paused" if q.paused else "open")
        for q in found.workers.queues
        if q.queued or q.running or q.paused or q.name in served
    ]
    parts += [Text(""), _table(("queue", "waiting", "running", "state"), queues)]
    return Group(*parts)


def memory_text(worker: WorkerView) -> str:
    """Memory of a worker's devices in words."""
    if worker.device_free is None or worker.device_total is None:
        return "none"
    return f"{format_size(worker.device_free)} free of {format_size(worker.device_total)}"


def _named(job: JobView) -> tuple[str, str, str, str]:
    return job.id, job.state, model_text(job), budget_text(job)


def _progress(job: JobView) -> str:
    if job.progress is None:
        return job.stage or "-"
    p = job.progress
    return f"{p.stage} {p.done}/{p.total} {p.unit}".rstrip()


def _left(job: JobView, now: datetime) -> str:
    if job.eta is None:
        return "-"
    return duration(max(0.0, (job.eta - now).total_seconds()))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", expand=False)
    for name in head:
        table.add_column(name, no_wrap=True, overflow="ellipsis")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _as_json(found: Snapshot) -> dict[str, object]:
    return {
        "live": [job.model_dump(mode="json", exclude={"spec"}) for job in found.live],
        "queued": [job.model_dump(mode="json", exclude={"spec"}) for job in found.queued],
        "more_queued": found.more,
        "workers": found.workers and found.workers.model_dump(mode="json"),
    }
