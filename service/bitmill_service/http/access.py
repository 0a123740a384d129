"""Who calls, and whether they may: API keys and their scopes, before a body is read. Plain ASGI.

    Authorization: Bearer bm_...

A browser that has signed in sends the same key as a cookie instead, and its changes must name the
page that asks (`Origin`), which `SameOrigin` has compared by then. What the pages are refused they
show themselves (`pages/app.py`).

One table says which scope a call needs (`needed_scope`); the description of the API is made from
the same. Health and the description are open. Where no key is asked for, every caller is `LOCAL`,
who may do everything: on loopback until the first key is made, and where `keys` is "off".

A key is looked up in the database at most every `_FRESH_S` seconds, so that it takes that long
until a revoked one is refused by the other processes.
"""

from __future__ import annotations

import hashlib
import ipaddress
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.requests import Request, cookie_parser
from starlette.types import ASGIApp, Receive, Scope, Send

from bitmill_service.http.problems import ProblemError, problem_response, store_response
from bitmill_service.settings import ServiceSettings
from bitmill_workers.store.catalog import LOCAL as LOCAL_TENANT
from bitmill_workers.store.db import DATABASE_ERRORS
from bitmill_workers.store.keys import KeyRecord, KeyStore, key_id_of
from bitmill_workers.store.limits import Limits, may_use_hub_token
from bitmill_workers.store.limits import Scope as KeyScope

PAGES = "/ui"
"""Where the pages lie: each needs the scope of the API's path of the same name."""
COOKIE = "bitmill_key"
OPEN = frozenset(
    {"/", "/healthz", "/readyz", "/docs", "/openapi.json", "/ui/sign-in", "/ui/sign-out"}
)
"""Paths that need no key."""

_STATIC = f"{PAGES}/static/"
_ADMIN = ("/v1/keys", "/v1/workers", "/metrics")
_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_FRESH_S = 5.0
_MOST = 4096
_HUB_TOKEN = "hf_"


def needed_scope(method: str, path: str) -> KeyScope | None:
    """The scope that a call needs; None where it needs no key."""
    if path in OPEN or path.startswith(_STATIC):
        return None
    if is_page(path):
        path = "/v1" + path.removeprefix(PAGES)
    if path.startswith(_ADMIN):
        return "admin"
    return "read" if method in _READING else "submit"


def is_page(path: str) -> bool:
    """Whether people look at this path, not programs."""
    return path == PAGES or path.startswith(f"{PAGES}/")


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls. `key_id` is None, and nothing is limited, where no key was asked for."""

    tenant: str
    scopes: frozenset[KeyScope]
    key_id: str | None = None
    name: str | None = None
    limits: Limits = field(default_factory=lambda: Limits(priorities=(-100, 100)))

    @property
    def sees(self) -> str | None:
        """The tenant whose jobs this caller may see; None: everybody's."""
        return None if "admin" in self.scopes else self.tenant

    def may(self, scope: KeyScope) -> bool:
        """Whether the caller has this scope; admin has all."""
        return scope in self.scopes or "admin" in self.scopes

    def may_use_hub_token(self, repo_id: str) -> bool:
        """Whether the operator's Hub token may be spent on this repository."""
        return may_use_hub_token(self.scopes, self.limits, repo_id)


LOCAL = Principal(LOCAL_TENANT, frozenset({"read", "submit", "admin"}))


def is_loopback(host: str) -> bool:
    """Whether an address to bind to is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class KeyRing:
    """The keys of the database as this process knows them."""

    def __init__(self, store: KeyStore, settings: ServiceSettings) -> None:
        self.store = store
        self._wanted = settings.keys == "required"
        self._off = settings.keys == "off"
        if settings.keys == "auto" and not is_loopback(settings.host):
            self._wanted = True
        self._looked = 0.0
        self._known: dict[str, tuple[float, Principal]] = {}

    def forget(self) -> None:
        """Look at the database again: a key was made or revoked here."""
        self._known.clear()
        self._looked = 0.0

    async def wanted(self) -> bool:
        """Whether calls need a key."""
        if self._wanted or self._off:
            return self._wanted
        if time.monotonic() - self._looked > _FRESH_S:
            self._wanted = await run_in_threadpool(self.store.any)
            self._looked = time.monotonic()
        return self._wanted

    async def holder(self, key: str) -> Principal | None:
        """Whose key this is; None where it cannot be used."""
        if key_id_of(key) is None:
            return None
        name = hashlib.sha256(key.encode()).hexdigest()
        until, known = self._known.get(name, (0.0, None))
        if known is not None and time.monotonic() < until:
            return known
        self._known.pop(name, None)
        record = await run_in_threadpool(self.store.find, key)
        if record is None:
            return None
        if len(self._known) >= _MOST:
            self._known.clear()
        found = _principal(record)
        self._known[name] = (time.monotonic() + _FRESH_S, found)
        return found


def _principal(record: KeyRecord) -> Principal:
    scopes: frozenset[KeyScope] = frozenset(record.scopes)
    return Principal(record.tenant, scopes, record.id, record.name, record.limits)


class Access:
    """Refuses calls without the key or the scope that they need; notes in the scope who calls."""

    def __init__(self, app: ASGIApp, ring: KeyRing) -> None:
        self.app, self.ring = app, ring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] == "http":
            state = scope.setdefault("state", {})
            try:
                caller = await self.check(scope["method"], scope["path"], Headers(scope=scope))
                state["principal"] = caller
            except ProblemError as refusal:
                if is_page(scope["path"]):
                    state["refusal"] = refusal
                else:
                    app = problem_response(Request(scope), refusal)
            except DATABASE_ERRORS as error:
                if is_page(scope["path"]):
                    state["refusal"] = error
                else:
                    app = store_response(Request(scope), error)
        await app(scope, receive, send)

    async def check(self, method: str, path: str, headers: Headers) -> Principal:
        """Who calls; raises `ProblemError` (401 or 403)."""
        needed = needed_scope(method, path)
        scheme, key = _credentials(headers)
        if needed is None:
            return LOCAL
        if key.startswith(_HUB_TOKEN):
            raise _unauthorized(
                "hub_token_refused",
                "this is a token of the Hugging Face Hub, which this service neither needs nor "
                "should see: give a key of this service as HF_TOKEN",
            )
        if not await self.ring.wanted():
            return LOCAL
        if not key or scheme.lower() != "bearer":
            raise _unauthorized("key_required", "this call needs an API key")
        if "authorization" not in headers and method not in _READING and "origin" not in headers:
            raise ProblemError(
                "cross_origin", "a signed-in browser must name the page that asks", param="Origin"
            )
        caller = await self.ring.holder(key)
        if caller is None:
            raise _unauthorized("key_refused", "this API key is unknown, mistyped, expired or gone")
        if not caller.may(needed):
            raise ProblemError(
                "scope_missing",
                f"this call needs the scope {needed}; the key {caller.key_id} has "
                f"{', '.join(sorted(caller.scopes))}",
                param="Authorization",
                headers=_told("this API key lacks the scope for this call"),
            )
        return caller


def _credentials(headers: Headers) -> tuple[str, str]:
    """Scheme and key of the header, else those of the cookie of a browser that has signed in."""
    if "authorization" in headers:
        scheme, _, key = headers["authorization"].partition(" ")
        return scheme, key.strip()
    return "Bearer", cookie_parser(headers.get("cookie", "")).get(COOKIE, "")


def _unauthorized(code: str, detail: str) -> ProblemError:
    headers = {"WWW-Authenticate": 'Bearer realm="bitmill"', **_told(detail)}
    return ProblemError(code, detail, param="Authorization", headers=headers)


def _told(message: str) -> Mapping[str, str]:
    """The header that clients of the Hugging Face Hub show their users."""
    return {"X-Error-Message": message}
