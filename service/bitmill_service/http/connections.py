"""Connections to the API: how many, and how long one may take to ask and to listen.

A client that never finishes its request would hold a file descriptor for ever. So a request's head
must be complete `head_s` seconds after the connection began to wait for it; a body must go on
within `idle_s` and be complete after `body_s`; an answer that nobody reads for `write_s` is broken
off. Of `limit` connections none is kept from a new one by those that wait: the one that has waited
longest for its client is closed instead. Only where all work on an answer a new one is refused.

limit = (open files that the process may have - 128) / 2, because a download holds a socket and a
file, at most 8192.

uvicorn counts waiting connections as work and has no deadlines but that of an idle connection. When
it stops, it waits for event streams as for any answer; they end because the event `STOPPING` of the
application's lifespan is set.
Given to it as its HTTP protocol: `--http bitmill_service.http.connections:GuardedProtocol`.
"""

from __future__ import annotations

import asyncio
import json
import resource
import socket
from typing import Any, Literal
from weakref import WeakKeyDictionary

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from bitmill_service.http.problems import CODES, MEDIA_TYPE
from bitmill_service.http.zero_copy import ZeroCopy

BACKLOG = 128
"""Connections that the kernel holds for `accept`, which takes all of them at once."""

STOPPING = "stopping"
"""Name of an `asyncio.Event` in the state that an application's lifespan gives the server."""

_OTHER_FILES = 128
_MOST = 8192
_waiting: WeakKeyDictionary[ServerState, dict[GuardedProtocol, None]] = WeakKeyDictionary()


def raise_file_limit() -> None:
    """Allow this process as many open files as it may allow itself."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def connection_limit() -> int:
    """How many connections this process holds at most."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _MOST
    return max(16, min(_MOST, (soft - _OTHER_FILES) // 2))


class GuardedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with deadlines and a limit; times in seconds."""

    head_s = 15.0
    idle_s = 15.0
    body_s = 300.0
    write_s = 60.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.app = ZeroCopy(self.app, self, self.write_s)
        self._limit = connection_limit()
        self._phase: Literal["head", "body", "work", "closed"] = "closed"
        self._phase_end = self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._peers = _waiting.setdefault(self.server_state, {})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # asyncio does so only for sockets that were made with a protocol number. An answer is a
        # head and a body, and the body would wait 40 ms for the client's word on the head.
        link = transport.get_extra_info("socket")
        if link.family in (socket.AF_INET, socket.AF_INET6):
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._follow()
        if len(self.connections) > self._limit:
            oldest = next(iter(self._peers), self)
            oldest.transport.abort()
            oldest._leave()

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """The server stops: no stream goes on."""
        stopping = self.app_state.get(STOPPING)
        if isinstance(stopping, asyncio.Event):
            stopping.set()
        super().shutdown()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._follow()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._follow()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()

    def send_400_response(self, msg: str) -> None:
        """A problem document, as for every other refusal."""
        status, hint = CODES["malformed_request"]
        code = "malformed_request"
        problem = {
            "type": f"urn:bitmill:error:{code}",
            "title": "Bad Request",
            "status": status,
            "detail": msg,
            "code": code,
            "param": None,
            "hint": hint,
            "request_id": None,
        }
        body = json.dumps(problem).encode()
        headers = [
            ("Content-Type", MEDIA_TYPE),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
        ]
        answer = (
            h11.Response(status_code=status, headers=headers, reason="Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        )
        for part in answer:
            self.transport.write(self.conn.send(part) or b"")
        self.transport.close()

    def _follow(self) -> None:
        """Notice what this connection waits for now, and until when it may."""
        if self.transport.is_closing():
            self._leave()
            return
        now, before = self.loop.time(), self._phase
        if self.cycle is None or self.cycle.response_complete:
            self._phase = "head"
        else:
            self._phase = "body" if self.cycle.more_body else "work"
        if self._phase == "work":
            self._peers.pop(self, None)
            return
        if self._phase != before:
            self._peers.pop(self, None)
            self._peers[self] = None
            self._phase_end = now + (self.head_s if self._phase == "head" else self.body_s)
        idle = now + self.idle_s if self._phase == "body" else self._phase_end
        self._deadline = min(self._phase_end, idle)
        if self._timer is None:
            self._timer = self.loop.call_at(self._deadline, self._on_deadline)

    def _on_deadline(self) -> None:
        self._timer = None
        if self._phase not in ("head", "body"):
            return
        if self.loop.time() < self._deadline:
            self._timer = self.loop.call_at(self._deadline, self._on_deadline)
        else:
            self.transport.abort()

    def _watch_writing(self, unread: int) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
        self._write_timer = self.loop.call_later(self.write_s, self._on_unread, unread)

    def _on_unread(self, before: int) -> None:
        unread = self.transport.get_write_buffer_size()
        if unread >= before:
            self.transport.abort()
        else:
            self._watch_writing(unread)

    def _leave(self) -> None:
        self._peers.pop(self, None)
        self._phase = "closed"
        for timer in (self._timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        self._timer = self._write_timer = None
