"""What every request passes through: an id, metrics, safe headers, a body limit. Plain ASGI.

The id is the client's `X-Request-ID` where it is short and printable, else a random one; it is in
the answer, in every problem document and in the log. Metrics are labelled with the route's
template and a known method, never with a path or a word that a client chose.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from contextlib import suppress

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bitmill_service.http.problems import ProblemError, problem_response
from bitmill_workers.logs import ACCESS, AUDIT, log_fields
from bitmill_workers.store.uploads import PART_BYTES

_log = logging.getLogger(__name__)
_access, _audit = logging.getLogger(ACCESS), logging.getLogger(AUDIT)
_REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"})
_DRAIN_S = 5.0
_PARTS = "/v1/uploads/"
_SPARE = 1 << 16
"""A part that is a little too long is refused as that, not by its length alone."""
_SAFE = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
}


class RequestContext:
    """Gives each request its id and counts it when its answer is complete."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self.app = app
        self.seconds = Histogram(
            "bitmill_http_request_seconds",
            "Time until the answer was complete",
            ("method", "route", "status"),
            registry=registry,
            buckets=(0.005, 0.02, 0.1, 0.5, 2, 10, 60),
        )
        self.sent = Counter(
            "bitmill_http_sent_bytes_total", "Bytes of answers", ("route",), registry=registry
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started, status, sent, began = time.perf_counter(), 500, 0, False

        async def observe(message: Message) -> None:
            nonlocal status, sent, began
            if message["type"] == "http.response.start":
                began, status = True, message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                for name, value in _SAFE.items():
                    headers.setdefault(name, value)
            else:
                sent += message.get("count") or len(message.get("body", b""))
            await send(message)

        try:
            with log_fields(request_id=request_id):
                await self.app(scope, receive, observe)
                _log_access(scope, status)
        except asyncio.CancelledError:
            # By the server, at the end of the time that requests have when it stops.
            _log.warning("stopped before an answer: %s %s", scope["method"], scope["path"])
            if not began:
                refusal = ProblemError(
                    "stopping",
                    "the service stops and has no answer yet",
                    headers={"Retry-After": "5"},
                )
                await problem_response(Request(scope), refusal)(scope, receive, observe)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            elapsed = time.perf_counter() - started
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self.seconds.labels(method, route, status).observe(elapsed)
            self.sent.labels(route).inc(sent)


def _log_access(scope: Scope, status: int) -> None:
    """One line of what was asked, and one that is kept of every change that was made."""
    caller, client = scope["state"].get("principal"), scope.get("client")
    who = {"address": client and client[0], "key": caller and caller.key_id}
    with log_fields(**who):
        changed = scope["method"] not in _READING and status < 400
        log = _audit if changed else _access
        log.info("%s %s %d", scope["method"], scope["path"], status)


class BodyLimit:
    """Refuses bodies over `limit` bytes, declared or not, before they are read whole.

    The framework's own limit answers in plain text; this one raises where the body is read, so
    that the refusal is a problem document like every other. Parts of uploads have a size of their
    own.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        is_part = scope["method"] == "PUT" and scope["path"].startswith(_PARTS)
        limit = max(self.limit, PART_BYTES + _SPARE) if is_part else self.limit
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")
        size = int(declared) if declared.isdecimal() else 0
        waits = headers.get("expect", "").lower() == "100-continue"
        read = 0

        async def limited() -> Message:
            nonlocal read
            if size > limit:
                if not waits:
                    await self._drain(receive)
                raise self._refusal(size, limit)
            message = await receive()
            read += len(message.get("body", b""))
            if read > limit:
                await self._drain(receive)
                raise self._refusal(read, limit)
            return message

        await self.app(scope, limited, send)

    async def _drain(self, receive: Receive) -> None:
        """Drop some more of the body: a client that is still sending would not hear the answer."""
        dropped = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_S):
                while dropped < self.limit:
                    message = await receive()
                    dropped += len(message.get("body", b""))
                    if not message.get("more_body"):
                        return

    @staticmethod
    def _refusal(size: int, limit: int) -> HTTPException:
        # What is left of the body is not read, so nothing more can come over this connection.
        detail = f"a body of {size} bytes; at most {limit} are accepted"
        return HTTPException(413, detail, headers={"Connection": "close"})
