"""Typed, synchronous Python client.

    with Client("http://127.0.0.1:8737") as client:
        job = client.submit({"model": {...}, "budget": {"code_bits": 3}})
        client.wait(job.id)
        client.download(job.id, Path("out"))

Requests are tried again on connection errors and on 429, 502, 503, 504 (`retries.py`); creations
carry an Idempotency-Key, so that a repeated one finds the first one's job. What goes wrong is in
`errors.py`.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self, TypeVar
from urllib.parse import quote

import httpx2

from bitmill.config.bit_width_map import BitWidthMap
from bitmill.formats.export_plan import ExportTarget
from bitmill.plan.fingerprint import Fingerprint
from bitmill_service.client.credentials import find_key
from bitmill_service.client.download import Download, download_files, select
from bitmill_service.client.errors import (
    JobCancelled,
    JobFailed,
    Unreachable,
    WaitTimeout,
    raise_for_problem,
    read_answer,
)
from bitmill_service.client.request_text import checked_header, checked_path
from bitmill_service.client.retries import (
    RETRY_STATUS,
    Retries,
    Waiting,
    backoff,
    retry_after,
    with_retries,
)
from bitmill_service.client.upload import announced, send_parts
from bitmill_service.schemas import (
    AllocationRequest,
    AllocationView,
    EventPage,
    EventView,
    ExportView,
    FileList,
    JobPage,
    JobView,
    KeyList,
    KeyRequest,
    KeyView,
    LogPage,
    MapPage,
    MapView,
    NewKeyView,
    PlanView,
    ProfilePage,
    ProfileView,
    SweepEventView,
    SweepPage,
    SweepView,
    UploadList,
    UploadView,
    View,
    WorkersView,
)
from bitmill_workers.job_spec import JobSpec, PushTarget
from bitmill_workers.sweep_spec import SweepSpec

DEFAULT_URL = "http://127.0.0.1:8737"
_POLL_SECONDS = 2.0
_PAGE = 200
_CHECK_S = 1800.0
"""How long a service may take to check an upload, or every cell of a sweep."""
_ViewT = TypeVar("_ViewT", bound=View)


class _BusyError(Exception):
    """The answer to a stream that may come another time."""

    def __init__(self, response: httpx2.Response) -> None:
        super().__init__(f"the service answered {response.status_code}")
        self.status = response.status_code
        self.retry_after = retry_after(response)


class Client:
    """One service. Close it, or use it as a context manager.

    url: default `BITMILL_URL`, else the embedded service's address.
    api_key: default `BITMILL_API_KEY`, else the one that `bitmill login` kept for this address.
    timeout: seconds without a byte before a request counts as broken.
    tries: how often one request is sent at most.
    patience: how many seconds `wait`, `events`, `logs` with `follow` and `download` go on without
    an answer, so that a restart of the service does not end them.
    on_wait: told, in words, what is waited for; from any thread.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float = 30.0,
        tries: int = 6,
        patience: float = 600.0,
        sleep: Callable[[float], None] = time.sleep,
        on_wait: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.url = (url or os.environ.get("BITMILL_URL") or DEFAULT_URL).rstrip("/")
        key = find_key(self.url) if api_key is None else api_key
        headers = {"User-Agent": "bitmill-client"}
        if key:
            headers["Authorization"] = f"Bearer {checked_header(key, 'the API key')}"
        self._retries = Retries(tries, patience, sleep, on_wait)
        self._sleep = sleep
        self._http = httpx2.Client(
            base_url=_address(self.url),
            timeout=httpx2.Timeout(timeout, connect=min(timeout, 10.0)),
            headers=headers,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def submit(
        self, spec: JobSpec | Mapping[str, Any], *, idempotency_key: str | None = None
    ) -> JobView:
        """Create a job. The same key and specification give the same job, within a day."""
        return self._create("/v1/jobs", _spec_json(spec), idempotency_key)

    def plan(self, spec: JobSpec | Mapping[str, Any]) -> PlanView:
        """What a job would do and need, without creating it."""
        response = self._send(
            "POST", "/v1/jobs", params={"validate_only": "true"}, json=_spec_json(spec)
        )
        return read_answer(PlanView, response)

    def get(self, job_id: str) -> JobView:
        """The job as it is now."""
        return self._get(JobView, f"/v1/jobs/{job_id}")

    def list_jobs(
        self,
        *,
        state: str | None = None,
        model: str | None = None,
        label: str | None = None,
        profile: str | None = None,
        kind: str | None = None,
        parent_id: str | None = None,
        limit: int = 50,
        after: str | None = None,
    ) -> JobPage:
        """One page of jobs, newest first."""
        return self._get(
            JobPage,
            "/v1/jobs",
            state=state,
            model=model,
            label=label,
            profile=profile,
            kind=kind,
            parent_id=parent_id,
            limit=limit,
            after=after,
        )

    def cancel(self, job_id: str) -> JobView:
        """Ask a job to stop; 409 `job_finished` where it has succeeded or failed."""
        return read_answer(JobView, self._send("POST", f"/v1/jobs/{job_id}/cancel"))

    def retry(self, job_id: str, *, idempotency_key: str | None = None) -> JobView:
        """A new job with the same specification and `parent_id` = `job_id`."""
        return self._create(f"/v1/jobs/{job_id}/retry", None, idempotency_key)

    def plan_export(self, job_id: str, target: ExportTarget) -> ExportView:
        """What an export of a finished job would take, without creating it."""
        response = self._send(
            "POST",
            f"/v1/jobs/{job_id}/exports",
            params={"validate_only": "true"},
            json=target.model_dump(mode="json"),
        )
        return read_answer(ExportView, response)

    def export(
        self, job_id: str, target: ExportTarget, *, idempotency_key: str | None = None
    ) -> JobView:
        """Write a finished job's result in another format, by a job with `parent_id` = `job_id`."""
        path = f"/v1/jobs/{job_id}/exports"
        return self._create(path, target.model_dump(mode="json"), idempotency_key)

    def push(
        self,
        job_id: str,
        target: PushTarget,
        token: str,
        *,
        idempotency_key: str | None = None,
    ) -> JobView:
        """Send a finished job's files to the Hub, by a job with `parent_id` = `job_id`.

        token: of the Hub, with the right to write there.
        """
        body = target.model_dump(mode="json") | {"token": token}
        return self._create(f"/v1/jobs/{job_id}/push", body, idempotency_key)

    def pin(self, job_id: str, pinned: bool = True) -> JobView:
        """Keep a job's files whatever their age, or no longer."""
        word = "pin" if pinned else "unpin"
        return read_answer(JobView, self._send("POST", f"/v1/jobs/{job_id}/{word}"))

    def submit_sweep(
        self, spec: SweepSpec | Mapping[str, Any], *, idempotency_key: str | None = None
    ) -> SweepView:
        """Create a job for every cell of a grid; the same key gives the same sweep for a day."""
        body = spec.model_dump(mode="json") if isinstance(spec, SweepSpec) else dict(spec)
        headers = _once(idempotency_key)
        answer = self._send("POST", "/v1/sweeps", json=body, headers=headers, timeout=_CHECK_S)
        return read_answer(SweepView, answer)

    def sweep(self, sweep_id: str) -> SweepView:
        """The sweep and its cells as they are now."""
        return self._get(SweepView, f"/v1/sweeps/{sweep_id}")

    def sweeps(self, *, limit: int = 50, after: str | None = None) -> SweepPage:
        """One page of sweeps, newest first, without their cells."""
        return self._get(SweepPage, "/v1/sweeps", limit=limit, after=after)

    def wait_sweep(
        self, sweep_id: str, *, on_change: Callable[[SweepView], None] | None = None
    ) -> SweepView:
        """Wait until every cell has ended, however it did; `on_change` is told of each look."""
        path, patience = f"/v1/sweeps/{sweep_id}", self._retries.patience
        while True:
            view = self._get(SweepView, path, patience)
            if on_change is not None:
                on_change(view)
            if view.finished:
                return view
            self._sleep(_POLL_SECONDS)

    def sweep_events(self, sweep_id: str) -> Iterator[SweepEventView]:
        """Events of all jobs of a sweep from the first on, as they come, until all have finished.

        A stream that breaks is opened again where it was. Raises `Unreachable` where nothing has
        come for `patience` seconds.
        """
        path, after = f"/v1/sweeps/{sweep_id}/events", ""
        waiting = Waiting(self._retries, self._retries.patience)
        while True:
            fault, asked = "the stream of events ended early", None
            try:
                for event in self._server_sent(path, after):
                    waiting.news()
                    if event.event == "end":
                        return
                    yield SweepEventView.model_validate_json(event.data)
                    after = event.id
            except httpx2.TransportError as error:
                fault = f"no answer ({error})"
            except _BusyError as error:
                fault, asked = f"the service answers {error.status}", error.retry_after
            if not waiting.pause(fault, asked):
                raise self._unreachable(fault)

    def cancel_sweep(self, sweep_id: str) -> SweepView:
        """Ask all unfinished jobs of a sweep to stop."""
        return read_answer(SweepView, self._send("POST", f"/v1/sweeps/{sweep_id}/cancel"))

    def delete_sweep(self, sweep_id: str) -> None:
        """Remove a sweep whose jobs have finished, with these jobs and their files."""
        self._send("DELETE", f"/v1/sweeps/{sweep_id}")

    def sweep_table(
        self, sweep_id: str, format: Literal["json", "csv", "markdown"] = "json"
    ) -> str:
        """What the cells found, as text of this format."""
        path = f"/v1/sweeps/{sweep_id}/table"
        return self._send("GET", path, params={"format": format}).text

    def sweep_plot(self, sweep_id: str) -> str:
        """Size against perplexity as SVG; 404 `no_plot_yet` before a cell has succeeded."""
        return self._send("GET", f"/v1/sweeps/{sweep_id}/plot").text

    def workers(self) -> WorkersView:
        """All queues, and the workers seen lately; needs an admin's key."""
        return self._get(WorkersView, "/v1/workers")

    def pause(self, *, queue: str | None = None, worker: str | None = None) -> WorkersView:
        """Let a queue, or a worker, take no more jobs; what runs goes on."""
        place = f"queues/{queue}/pause" if queue is not None else f"{worker}/drain"
        return read_answer(WorkersView, self._send("POST", f"/v1/workers/{place}"))

    def resume(self, *, queue: str | None = None, worker: str | None = None) -> WorkersView:
        """Let a queue, or a worker, take jobs again."""
        place = f"queues/{queue}/resume" if queue is not None else f"{worker}/resume"
        return read_answer(WorkersView, self._send("POST", f"/v1/workers/{place}"))

    def delete(self, job_id: str) -> None:
        """Remove a finished job with all its files."""
        self._send("DELETE", f"/v1/jobs/{job_id}")

    def event_page(self, job_id: str, *, after: int = 0, limit: int = 500) -> EventPage:
        """Events with `seq` > `after`."""
        return self._event_page(job_id, after, None, limit)

    def events(self, job_id: str, *, after: int = 0) -> Iterator[EventView]:
        """All events from `after` on, as they come, until the job has finished.

        Follows the server-sent stream; where that breaks it asks for pages, and goes back to the
        stream. Ends by raising only when the service stays unreachable.
        """
        failures = 0
        while True:
            seen, broken = after, False
            try:
                for event in self._stream(job_id, after):
                    if event is None:
                        return
                    after = event.seq
                    yield event
            except (httpx2.TransportError, _BusyError):
                broken = True
            page = self._event_page(job_id, after, self._retries.patience)
            yield from page.events
            after = page.next_after
            if page.end:
                return
            failures = 0 if after > seen else min(failures + 1, 5)
            if broken and failures:
                self._sleep(backoff(failures))

    def wait(
        self,
        job_id: str,
        *,
        timeout: float | None = None,
        on_event: Callable[[EventView], None] | None = None,
        after: int = 0,
    ) -> JobView:
        """Wait until the job has succeeded, and return it.

        Raises `JobFailed`, `JobCancelled`, or `WaitTimeout` after `timeout` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        for event in self._events_until(job_id, after, deadline):
            if on_event is not None:
                on_event(event)
        job = self._get(JobView, f"/v1/jobs/{job_id}", _left(self._retries.patience, deadline))
        if not job.terminal:
            raise WaitTimeout(job, f"job {job_id} is still {job.state} after {timeout:g} s")
        if job.state == "cancelled":
            raise JobCancelled(job, f"job {job_id} was cancelled")
        if job.state == "failed":
            failed = JobFailed(job)
            raise failed from failed.error
        return job

    def log_page(self, job_id: str, *, offset: int = 0) -> LogPage:
        """A piece of the job's log from byte `offset`."""
        return self._log_page(job_id, offset, None)

    def logs(self, job_id: str, *, offset: int = 0, follow: bool = False) -> Iterator[str]:
        """The job's log; with `follow`, until the job has finished."""
        patience = self._retries.patience if follow else None
        while True:
            page = self._log_page(job_id, offset, patience)
            if page.text:
                yield page.text
            if page.end or (not follow and page.next_offset == offset):
                return
            if page.next_offset == offset:
                self._sleep(_POLL_SECONDS)
            offset = page.next_offset

    def bit_width_map(self, job_id: str) -> BitWidthMap:
        """The finished job's bit-width map."""
        response = self._send("GET", f"/v1/jobs/{job_id}/bit-width-map")
        return read_answer(BitWidthMap, response)

    def report(self, job_id: str) -> dict[str, Any]:
        """The finished job's quality report."""
        report = self._send("GET", f"/v1/jobs/{job_id}/report").json()
        assert isinstance(report, dict)
        return report

    def files(self, job_id: str) -> FileList:
        """The finished job's files with sizes and SHA-256."""
        return self._get(FileList, f"/v1/jobs/{job_id}/files")

    def download(
        self,
        job_id: str,
        folder: Path,
        *,
        include: Sequence[str] = (),
        parallel: int = 4,
        on_bytes: Callable[[int], None] | None = None,
    ) -> Download:
        """Bring the job's files into `folder`, verified against their SHA-256.

        Files that are already there and match are skipped; broken downloads are continued, also
        by a later call. Several calls may bring files into one folder at once. `include`: glob
        patterns of paths. Raises `InputError` where a pattern matches nothing, and where
        something stands in a file's way, or differs from it and is none of an earlier result.
        """
        listed = self._get(FileList, f"/v1/jobs/{job_id}/files", self._retries.patience)
        return download_files(
            self._http,
            select(listed.files, include),
            folder,
            parallel=parallel,
            on_bytes=on_bytes or (lambda _: None),
            retries=self._retries,
        )

    def profiles(self) -> list[ProfileView]:
        """All stored sensitivity profiles, by id."""
        found: list[ProfileView] = []
        after: str | None = None
        while True:
            page = self._get(ProfilePage, "/v1/profiles", limit=_PAGE, after=after)
            found += page.profiles
            if (after := page.next) is None:
                return found

    def profile(self, profile_id: str) -> ProfileView:
        """One stored sensitivity profile."""
        return self._get(ProfileView, f"/v1/profiles/{profile_id}")

    def allocate(self, profile_id: str, request: AllocationRequest) -> AllocationView:
        """Spend another budget on a stored profile."""
        response = self._send(
            "POST",
            f"/v1/profiles/{profile_id}/allocate",
            json=request.model_dump(mode="json", exclude_unset=True),
        )
        return read_answer(AllocationView, response)

    def maps(self, *, model: str | None = None) -> list[MapView]:
        """All stored bit-width maps, by id; model: of one with this shape or these weights."""
        found: list[MapView] = []
        after: str | None = None
        while True:
            page = self._get(MapPage, "/v1/bit-width-maps", model=model, limit=_PAGE, after=after)
            found += page.maps
            if (after := page.next) is None:
                return found

    def stored_map(self, map_id: str) -> BitWidthMap:
        """One stored bit-width map."""
        return read_answer(BitWidthMap, self._send("GET", f"/v1/bit-width-maps/{map_id}"))

    def upload_map(self, content: bytes, *, model: Fingerprint | None = None) -> MapView:
        """Store a bit-width map: this project's JSON, or a file published with SliM-LLM.

        model: the fingerprint of the model that it is of.
        """
        response = self._send(
            "POST",
            "/v1/bit-width-maps",
            params={} if model is None else model.model_dump(exclude_none=True),
            content=content,
            headers={"Content-Type": "application/octet-stream"},
        )
        return read_answer(MapView, response)

    def upload(
        self,
        place: Path,
        *,
        on_start: Callable[[int], None] = lambda size: None,
        on_bytes: Callable[[int], None] = lambda count: None,
    ) -> UploadView:
        """Send a model's folder, or one GGUF file, and have it checked.

        Files that no model needs stay here. A broken call is gone on with by the next one.
        on_start: told how many bytes there are; on_bytes: how many more have arrived.
        """
        folder, request = announced(place)
        body = request.model_dump(mode="json")
        upload = read_answer(UploadView, self._send("POST", "/v1/uploads", json=body))
        on_start(upload.size)
        if upload.state == "complete":
            on_bytes(upload.size)
            return upload
        base, patience = f"/v1/uploads/{upload.id}", self._retries.patience

        def put(path: str, number: int, data: bytes, digest: str) -> None:
            self._send(
                "PUT",
                f"{base}/files/{quote(path)}",
                patience=patience,
                params={"part": number},
                content=data,
                headers={"Content-Digest": digest, "Content-Type": "application/octet-stream"},
            )

        send_parts(upload, folder, put, on_bytes)
        done = self._send("POST", f"{base}/complete", patience=patience, timeout=_CHECK_S)
        return read_answer(UploadView, done)

    def uploads(self) -> list[UploadView]:
        """All uploads, oldest first."""
        return self._get(UploadList, "/v1/uploads").uploads

    def delete_upload(self, upload_id: str) -> None:
        """Remove an upload and its files."""
        self._send("DELETE", f"/v1/uploads/{upload_id}")

    def create_key(self, request: KeyRequest) -> NewKeyView:
        """Make an API key, which only this answer shows; sent once, as it cannot be repeated."""
        once = replace(self._retries, tries=1)
        body = request.model_dump(mode="json")
        return read_answer(NewKeyView, self._send("POST", "/v1/keys", json=body, retries=once))

    def keys(self) -> list[KeyView]:
        """All API keys without their secrets, revoked ones too."""
        return self._get(KeyList, "/v1/keys").keys

    def revoke_key(self, key_id: str) -> None:
        """End an API key."""
        self._send("DELETE", f"/v1/keys/{key_id}")

    def ready(self) -> bool:
        """Whether the service can take jobs."""
        response = self._raw("GET", "/readyz", retries=replace(self._retries, tries=1))
        return response.status_code == 200

    def _event_page(
        self, job_id: str, after: int, patience: float | None, limit: int = 500
    ) -> EventPage:
        path = f"/v1/jobs/{job_id}/events"
        return self._get(EventPage, path, patience, after=after, limit=limit)

    def _log_page(self, job_id: str, offset: int, patience: float | None) -> LogPage:
        return self._get(LogPage, f"/v1/jobs/{job_id}/logs", patience, offset=offset)

    def _get(
        self, view: type[_ViewT], path: str, patience: float | None = None, **params: Any
    ) -> _ViewT:
        given = {key: value for key, value in params.items() if value is not None}
        return read_answer(view, self._send("GET", path, patience=patience, params=given))

    def _create(self, path: str, body: Any, key: str | None) -> JobView:
        return read_answer(JobView, self._send("POST", path, json=body, headers=_once(key)))

    def _send(self, method: str, path: str, **kwargs: Any) -> httpx2.Response:
        response = self._raw(method, path, **kwargs)
        raise_for_problem(response)
        return response

    def _raw(
        self,
        method: str,
        path: str,
        *,
        patience: float | None = None,
        retries: Retries | None = None,
        **kwargs: Any,
    ) -> httpx2.Response:
        """The answer after retries; with `patience` as long as that lasts."""
        try:
            return with_retries(
                lambda: self._http.request(method, checked_path(path), **kwargs),
                retries or self._retries,
                patience=patience,
            )
        except httpx2.TransportError as error:
            raise self._unreachable(str(error)) from error

    def _unreachable(self, fault: str) -> Unreachable:
        return Unreachable(
            f"no answer from {self.url} ({fault}): is the service running? "
            "Start one with `bitmill serve`, or set BITMILL_URL"
        )

    def _stream(self, job_id: str, after: int) -> Iterator[EventView | None]:
        """Events of one server-sent stream; None when the server says that it is complete."""
        for event in self._server_sent(f"/v1/jobs/{job_id}/events", str(after)):
            if event.event == "end":
                yield None
                return
            yield EventView.model_validate_json(event.data)

    def _server_sent(self, path: str, after: str) -> Iterator[httpx2.ServerSentEvent]:
        """One server-sent stream behind `after`; raises `_BusyError` where it is to be asked for
        again."""
        headers = {"Accept": "text/event-stream", "Last-Event-ID": after}
        with self._http.stream("GET", checked_path(path), headers=headers) as response:
            if response.status_code >= 400:
                response.read()
                if response.status_code in RETRY_STATUS:
                    raise _BusyError(response)
                raise_for_problem(response)
            yield from httpx2.EventSource(response)

    def _events_until(self, job_id: str, after: int, deadline: float | None) -> Iterator[EventView]:
        """`events` without a deadline; with one, pages, so that a silent job cannot hold it."""
        if deadline is None:
            yield from self.events(job_id, after=after)
            return
        while True:
            left = _left(self._retries.patience, deadline)
            page = self._event_page(job_id, after, left)
            yield from page.events
            after = page.next_after
            left = deadline - time.monotonic()
            if page.end or left <= 0:
                return
            if not page.events:
                self._sleep(min(_POLL_SECONDS / 4, left))


def _address(url: str) -> httpx2.URL:
    try:
        address = httpx2.URL(url)
        odd = address.scheme not in ("http", "https") or not address.host
        odd |= (address.port or 0) > 65535
    except httpx2.InvalidURL:
        odd = True
    if odd:
        raise Unreachable(f"{url!r} is no address of a service: give one such as {DEFAULT_URL}")
    return address


def _once(key: str | None) -> dict[str, str]:
    """The header by which a repeated creation finds the first one's."""
    given = uuid.uuid4().hex if key is None else checked_header(key, "the idempotency key")
    return {"Idempotency-Key": given}


def _left(patience: float, deadline: float | None) -> float:
    """Seconds of patience that end with the deadline."""
    return patience if deadline is None else max(0.0, min(patience, deadline - time.monotonic()))


def _spec_json(spec: JobSpec | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(spec, JobSpec):
        return spec.model_dump(mode="json", exclude_none=True)
    loaded = json.loads(json.dumps(dict(spec)))
    assert isinstance(loaded, dict)
    return loaded
