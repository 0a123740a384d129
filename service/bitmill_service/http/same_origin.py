"""Keeps web pages of other origins away from a service that asks nobody who they are.

A page that a user visits can make the browser send requests to loopback. So a request that changes
something is refused when its `Origin` is another one than the address it was sent to, and, where
`hosts` is given, any request is refused that was not sent to one of these names, which a page
reaches by pointing its own name at 127.0.0.1. Programs send no `Origin` and are not affected.
"""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from bitmill_service.http.problems import ProblemError, problem_response

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")
_READING = frozenset({"GET", "HEAD", "OPTIONS"})


class SameOrigin:
    """Plain ASGI; `hosts` empty accepts every host name."""

    def __init__(self, app: ASGIApp, hosts: Collection[str] = ()) -> None:
        self.app, self.hosts = app, frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            try:
                self.check(scope["method"], headers.get("host", ""), headers.get("origin"))
            except ProblemError as refusal:
                app = problem_response(Request(scope), refusal)
        await app(scope, receive, send)

    def check(self, method: str, host: str, origin: str | None) -> None:
        """Raise `ProblemError` for a request that comes from another origin's page."""
        if self.hosts and _parts(f"//{host}").hostname not in self.hosts:
            raise ProblemError(
                "wrong_host", f"this service does not answer for host {host!r}", param="Host"
            )
        if origin is not None and method not in _READING and _parts(origin).netloc != host:
            raise ProblemError(
                "cross_origin", f"pages of {origin} may not change anything here", param="Origin"
            )


def _parts(address: str) -> SplitResult:
    """The address taken apart; nothing is in it where it is malformed."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")
