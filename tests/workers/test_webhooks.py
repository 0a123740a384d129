"""Webhooks against a real HTTP receiver."""

from __future__ import annotations

import hashlib
import hmac
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from bitmill_workers.db import Database
from bitmill_workers.jobs import JobStore
from bitmill_workers.settings import Settings
from bitmill_workers.tables import outbox
from bitmill_workers.webhooks import (
    MAX_TRIES,
    AddressRefused,
    WebhookSender,
    check_webhook_url,
    resolve_public,
)
from stores import spec

pytestmark = pytest.mark.parametrize("dialect", ["sqlite", "postgresql"])
SECRET = "a-long-random-value"


class _Receiver(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((dict(self.headers), body))  # type: ignore[attr-defined]
        status = self.server.answers.pop(0)  # type: ignore[attr-defined]
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "http://127.0.0.1:1/")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def receiver() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), _Receiver)
    server.got, server.answers = [], []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def allowed(settings: Settings) -> Settings:
    changed = {"webhook_secret": SecretStr(SECRET), "webhook_private": True}
    return settings.model_copy(update=changed)


def due_now(database: Database) -> None:
    with database.write() as conn:
        conn.execute(sa.update(outbox).values(next_try=0.0))


def test_message_is_signed_and_repeated_until_taken(
    allowed: Settings, database: Database, store: JobStore, receiver: HTTPServer
) -> None:
    url = f"http://127.0.0.1:{receiver.server_port}/hook?x=1"
    job = store.submit(spec(label="mine"), webhook_url=url).job
    sender = WebhookSender(allowed, database)
    assert sender.deliver_due() == 0
    store.request_cancel(job.id)
    receiver.answers[:] = [503, 302, 200]  # type: ignore[attr-defined]
    assert sender.deliver_due() == 0
    assert sender.deliver_due() == 0
    due_now(database)
    assert sender.deliver_due() == 0
    due_now(database)
    assert sender.deliver_due() == 1
    due_now(database)
    assert sender.deliver_due() == 0
    got = receiver.got  # type: ignore[attr-defined]
    assert len(got) == 3
    headers, body = got[-1]
    at, digest = (part.split("=")[1] for part in headers["Bitmill-Signature"].split(","))
    wanted = hmac.new(SECRET.encode(), f"{at}.".encode() + body, hashlib.sha256).hexdigest()
    assert digest == wanted
    message = json.loads(body)
    assert (message["job_id"], message["state"], message["label"]) == (job.id, "cancelled", "mine")


def test_sending_gives_up_at_the_cap(
    allowed: Settings, database: Database, store: JobStore
) -> None:
    job = store.submit(spec(), webhook_url="http://127.0.0.1:1/").job
    store.request_cancel(job.id)
    sender = WebhookSender(allowed, database)
    for _ in range(MAX_TRIES + 3):
        due_now(database)
        sender.deliver_due()
    with database.read() as conn:
        row = conn.execute(sa.select(outbox)).one()
    assert (row.tries, row.delivered_at) == (MAX_TRIES, None)
    assert "refused" in row.last_error


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/",
        "ftp://example.com/",
        "https://u:p@example.com/",
        "https:///x",
        "x",
        "https://example.com:99999/",
    ],
)
def test_odd_address_is_refused_at_submission(settings: Settings, url: str) -> None:
    strict = settings.model_copy(update={"webhook_secret": SecretStr(SECRET)})
    with pytest.raises(AddressRefused):
        check_webhook_url(url, strict)
    check_webhook_url("https://example.com/hook", strict)
    with pytest.raises(AddressRefused, match="BITMILL_WEBHOOK_SECRET"):
        check_webhook_url("https://example.com/hook", settings)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "10.1.2.3",
        "192.168.0.1",
        "169.254.169.254",
        "::1",
        "::ffff:127.0.0.1",
        "fe80::1",
        "0.0.0.0",
        "100.64.0.1",
        "224.0.0.1",
        "localhost",
        "2002:7f00:1::",
    ],
)
def test_private_address_is_never_called(settings: Settings, host: str) -> None:
    with pytest.raises(AddressRefused):
        resolve_public(host, 443, allow_private=False)
    assert settings.webhook_private is False
    assert resolve_public("8.8.8.8", 443, allow_private=False) == "8.8.8.8"
