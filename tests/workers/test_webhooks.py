"""Webhooks against a real HTTP receiver."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from bitmill_workers.messaging import webhooks
from bitmill_workers.messaging.webhooks import (
    AddressRefused,
    WebhookSender,
    check_webhook_url,
    resolve_public,
)
from bitmill_workers.settings import Settings
from bitmill_workers.store.db import Database
from bitmill_workers.store.jobs import JobStore
from bitmill_workers.store.records import Delivery
from bitmill_workers.store.stats import read_stats
from bitmill_workers.store.tables import DELIVERY_TRIES, outbox
from stores import spec

pytestmark = pytest.mark.parametrize("dialect", ["sqlite", "postgresql"])
SECRET = "a-long-random-value"


class _Receiver(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((dict(self.headers), body))
        status = self.server.answers.pop(0)
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
    server.got, server.answers = [], []
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
    assert store.seen_of(job).delivery == Delivery()
    store.request_cancel(job.id)
    receiver.answers[:] = [503, 302, 200]
    assert sender.deliver_due() == 0
    assert sender.deliver_due() == 0
    refused = store.seen_of(job).delivery
    assert refused is not None
    assert (refused.tries, refused.last_error, refused.delivered_at) == (1, "answered 503", None)
    due_now(database)
    assert sender.deliver_due() == 0
    due_now(database)
    assert sender.deliver_due() == 1
    due_now(database)
    assert sender.deliver_due() == 0
    taken = store.seen_of(job).delivery
    assert taken is not None
    assert (taken.tries, taken.last_error, taken.delivered_at is None) == (3, None, False)
    got = receiver.got
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
    for _ in range(DELIVERY_TRIES + 3):
        due_now(database)
        sender.deliver_due()
    with database.read() as conn:
        row = conn.execute(sa.select(outbox)).one()
    assert (row.tries, row.delivered_at) == (DELIVERY_TRIES, None)
    assert "refused" in row.last_error
    assert read_stats(database).webhooks_waiting == 0


def test_a_receiver_that_never_ends_its_answer_does_not_hold_up_the_others(
    allowed: Settings, database: Database, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "_ANSWER_S", 0.2)
    listener = socket.create_server(("127.0.0.1", 0))

    def drip() -> None:
        link, _ = listener.accept()
        with link, suppress(OSError):
            while True:
                link.sendall(b"H")
                gone.wait(0.01)

    gone = threading.Event()
    dripping = threading.Thread(target=drip)
    dripping.start()
    job = store.submit(spec(), webhook_url=f"http://127.0.0.1:{listener.getsockname()[1]}/").job
    store.request_cancel(job.id)
    assert WebhookSender(allowed, database).deliver_due() == 0
    dripping.join(20)
    assert not dripping.is_alive()
    listener.close()


def test_a_stored_address_that_cannot_be_called_is_noted_and_not_raised(
    allowed: Settings, database: Database, store: JobStore
) -> None:
    for url in (f"http://{'a' * 70}.example/", "http://127.0.0.1:1/\u00fc"):
        job = store.submit(spec(), webhook_url=url).job
        store.request_cancel(job.id)
    assert WebhookSender(allowed, database).deliver_due() == 0
    with database.read() as conn:
        errors = conn.execute(sa.select(outbox.c.last_error)).scalars().all()
    assert len([error for error in errors if error]) == 2


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/",
        "ftp://example.com/",
        "https://u:p@example.com/",
        "https:///x",
        "x",
        "https://example.com:99999/",
        "https://example.com/\u00fc",
        "https://example.com/a b",
        f"https://example.com/{'x' * 2048}",
    ],
)
def test_odd_address_is_refused_at_submission(settings: Settings, url: str) -> None:
    strict = settings.model_copy(update={"webhook_secret": SecretStr(SECRET)})
    with pytest.raises(AddressRefused, match=re.escape(repr(url[:200]))) as refused:
        check_webhook_url(url, strict)
    assert refused.value.param == "Webhook-URL"
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
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "::7f00:1",
        "::ffff:a00:1",
        "2001:0:7f00:1::",
        "fd00::1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "127.1",
    ],
)
def test_private_address_is_refused_at_submission_and_never_called(
    settings: Settings, host: str
) -> None:
    with pytest.raises(AddressRefused):
        resolve_public(host, 443, allow_private=False)
    strict = settings.model_copy(update={"webhook_secret": SecretStr(SECRET)})
    shown = f"[{host}]" if ":" in host else host
    with pytest.raises(AddressRefused, match="not public") as refused:
        check_webhook_url(f"https://{shown}/hook", strict)
    assert (refused.value.code, refused.value.param) == ("webhook_refused", "Webhook-URL")
    assert settings.webhook_private is False
    assert resolve_public("8.8.8.8", 443, allow_private=False) == "8.8.8.8"
    assert resolve_public("64:ff9b::808:808", 443, allow_private=False) == "64:ff9b::808:808"


def test_a_name_that_has_no_address_now_is_taken(settings: Settings) -> None:
    strict = settings.model_copy(update={"webhook_secret": SecretStr(SECRET)})
    check_webhook_url("https://no-such-host.invalid/hook", strict)
