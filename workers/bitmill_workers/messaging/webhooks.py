"""Tell a client's server that a job has ended: signed, repeated until taken, never inwards.

The body is JSON; the header `Bitmill-Signature: t=<time>,v1=<hex>` holds
HMAC-SHA256(secret, "<time>.<body>"), so that a receiver can refuse old and foreign messages. The
address is resolved once, refused where it is not public, and connected to as resolved; redirects
are not followed. A message may arrive more than once: `Bitmill-Delivery` names it.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import ipaddress
import json
import logging
import socket
import ssl
import threading
import time
from contextlib import suppress
from urllib.parse import SplitResult, urlsplit

import sqlalchemy as sa

from bitmill.errors import InputError
from bitmill_workers.settings import Settings
from bitmill_workers.store.db import Database, db_now
from bitmill_workers.store.tables import DELIVERY_TRIES, outbox

_log = logging.getLogger(__name__)
_TIMEOUT_S = 10.0
_ANSWER_S = 30.0
_BATCH = 20
_MAX_URL = 2048
_FIRST_DELAY_S = 10.0
_ENDS_IN_IPV4 = (
    ipaddress.IPv6Network("64:ff9b::/96"),  # NAT64 (RFC 6052)
    ipaddress.IPv6Network("::/96"),  # IPv4-compatible (RFC 4291 section 2.5.5.1)
)


class AddressRefused(InputError):
    """A webhook's address is malformed, or not public."""

    code = "webhook_refused"


class NoAddress(AddressRefused):
    """A webhook's host has no address now; it may have one when the job has ended."""


def check_webhook_url(url: str, settings: Settings) -> None:
    """Refuse at submission an address that would never be called. Raises `AddressRefused`."""
    if settings.webhook_secret is None:
        raise AddressRefused(
            "webhooks are off: the service has no BITMILL_WEBHOOK_SECRET", param="Webhook-URL"
        )
    parts = _split(url, settings)
    assert parts.hostname is not None
    with suppress(NoAddress):
        resolve_public(parts.hostname, _port(parts), allow_private=settings.webhook_private)


def _split(url: str, settings: Settings) -> SplitResult:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise AddressRefused(
            f"webhook address {url[:200]!r} is malformed: {error}", param="Webhook-URL"
        ) from error
    schemes = ("https", "http") if settings.webhook_private else ("https",)
    odd = parts.username is not None or port == 0 or len(url) > _MAX_URL or not _plain(url)
    if parts.scheme not in schemes or not parts.hostname or odd:
        raise AddressRefused(
            f"webhook address {url[:200]!r} is not https://host[:port]/path of at most {_MAX_URL} "
            "printable ASCII characters without a user name",
            param="Webhook-URL",
        )
    return parts


def _port(parts: SplitResult) -> int:
    return parts.port or (443 if parts.scheme == "https" else 80)


def _plain(url: str) -> bool:
    return url.isascii() and url.isprintable() and " " not in url


def resolve_public(host: str, port: int, *, allow_private: bool) -> str:
    """One address of `host`. Raises `AddressRefused` where any of them is not public."""
    try:
        found = {str(a[4][0]) for a in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError) as error:
        raise NoAddress(f"{host} does not resolve", param="Webhook-URL") from error
    for address in sorted(found):
        if not allow_private and not _is_public(address):
            raise AddressRefused(
                f"{host} has the address {address}, which is not public", param="Webhook-URL"
            )
    return sorted(found)[0]


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    inner = _inner(ip) if isinstance(ip, ipaddress.IPv6Address) else None
    return ip.is_global and not ip.is_multicast and (inner is None or _is_public(str(inner)))


def _inner(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that a packet to this IPv6 address may be sent on to."""
    if ip.ipv4_mapped or ip.sixtofour:
        return ip.ipv4_mapped or ip.sixtofour
    if any(ip in network for network in _ENDS_IN_IPV4):
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return None


def sign(secret: str, at: int, body: bytes) -> str:
    """The signature header's value."""
    digest = hmac.new(secret.encode(), f"{at}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={at},v1={digest}"


class WebhookSender:
    """Delivers what is due; any number of processes may do so at once."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings = settings
        self._database = database

    def deliver_due(self) -> int:
        """Try every message that is due once; how many were taken."""
        if self._settings.webhook_secret is None:
            return 0
        due = (outbox.c.delivered_at.is_(None), outbox.c.next_try <= db_now())
        with self._database.read() as conn:
            query = sa.select(outbox.c.id, outbox.c.tries).where(*due)
            query = query.where(outbox.c.tries < DELIVERY_TRIES).order_by(outbox.c.next_try)
            waiting = conn.execute(query.limit(_BATCH)).all()
        return sum(self._deliver(message, tries) for message, tries in waiting)

    def _deliver(self, message: str, tries: int) -> bool:
        row = self._take(message, tries)
        if row is None:
            return False
        body = json.dumps(row.payload, sort_keys=True).encode()
        try:
            status = self._post(row.url, body, message)
            error = None if 200 <= status < 300 else f"answered {status}"
        except (AddressRefused, OSError, http.client.HTTPException) as failure:
            error = str(failure) or type(failure).__name__
        done = {"last_error": error} | ({} if error else {"delivered_at": db_now()})
        with self._database.write() as conn:
            conn.execute(sa.update(outbox).where(outbox.c.id == message).values(done))
        if error:
            _log.warning("webhook of job %s, try %d: %s", row.job_id, row.tries, error)
        return error is None

    def _take(self, message: str, tries: int) -> sa.Row[tuple[object, ...]] | None:
        """Claim one message by counting its try; None where another process was first."""
        mine = (outbox.c.id == message, outbox.c.tries == tries, outbox.c.delivered_at.is_(None))
        statement = (
            sa.update(outbox)
            .where(*mine)
            .values(tries=tries + 1, next_try=db_now() + _FIRST_DELAY_S * 2.0**tries)
            .returning(outbox.c.job_id, outbox.c.url, outbox.c.payload, outbox.c.tries)
        )
        with self._database.write() as conn:
            return conn.execute(statement).one_or_none()

    def _post(self, url: str, body: bytes, message: str) -> int:
        settings = self._settings
        assert settings.webhook_secret is not None
        parts = _split(url, settings)
        assert parts.hostname is not None
        port = _port(parts)
        address = resolve_public(parts.hostname, port, allow_private=settings.webhook_private)
        connection = http.client.HTTPConnection(parts.hostname, port)
        connection.sock = link = _connect(parts.scheme, parts.hostname, address, port)
        # A receiver that answers byte by byte would keep every single read within its timeout.
        deadline = threading.Timer(_ANSWER_S, _hang_up, (link,))
        deadline.start()
        try:
            headers = {
                "Content-Type": "application/json",
                "User-Agent": "bitmill-webhook",
                "Bitmill-Delivery": message,
                "Bitmill-Signature": sign(
                    settings.webhook_secret.get_secret_value(), int(time.time()), body
                ),
            }
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("POST", target, body, headers)
            return connection.getresponse().status
        finally:
            deadline.cancel()
            connection.close()


def _connect(scheme: str, host: str, address: str, port: int) -> socket.socket:
    """A connection to `address`, whose certificate must be for `host` where the scheme is https."""
    link = socket.create_connection((address, port), timeout=_TIMEOUT_S)
    if scheme != "https":
        return link
    try:
        return ssl.create_default_context().wrap_socket(link, server_hostname=host)
    except BaseException:
        link.close()
        raise


def _hang_up(link: socket.socket) -> None:
    with suppress(OSError):
        link.shutdown(socket.SHUT_RDWR)
