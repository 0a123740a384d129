"""Secrets given to a whole run are nowhere afterwards: in no log, row, message, file, answer or
request to another host."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa

from bitmill_service.client.client import Client
from bitmill_workers.settings import Settings
from bitmill_workers.store.db import Database
from bitmill_workers.store.keys import KeyStore
from bitmill_workers.store.migrate import upgrade
from faulty_hub import FaultyHub, serving
from native import native_stack
from stores import wait_for
from tiny import CALIBRATION, tiny_llama
from warm_python import FORKED

HUB_TOKEN = "hf_canaryQ7uZk2VbN4mXw9RtY1pLs8DfGh"
HOOK_SECRET = "canary-hook-5b1f0c7de2a94836"
OWN_TOKEN = "hf_canaryOfTheUserT3nB6vC9xZ2qW5eR8"
SPEC = {
    "budget": {"code_bits": 4},
    "allocation": {"method": "uniform", "order": "natural"},
    "refinement": {"method": "rtn"},
    "calibration": {
        "text": {"source": "file", "path": "models/text.txt"},
        "sequences": 2,
        "length": 32,
        "held_out": 1,
    },
    "evaluation": {"sequences": 1, "length": 32},
}


def with_text(folder: Path) -> Path:
    """A root of models with the text of `SPEC` in it."""
    root = folder / "models"
    root.mkdir()
    shutil.copy(CALIBRATION, root / "text.txt")
    return root


class Listener(ThreadingHTTPServer):
    """Another host: takes anything, and remembers every byte of it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Take)
        self.heard: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Take(BaseHTTPRequestHandler):
    server: Listener

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.heard.append(f"{self.requestline}\n{self.headers}\n{body.decode()}")
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


@contextmanager
def listening() -> Iterator[Listener]:
    server = Listener()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


class Run:
    """What a run was given to keep, and all places where it may have been left."""

    def __init__(self, secrets: dict[str, str]) -> None:
        self.secrets = secrets
        self.texts: dict[str, str] = {}

    def folder(self, place: Path, without: str = "") -> None:
        for path in place.rglob("*"):
            if path.is_file() and path.name != without:
                self.texts[str(path.relative_to(place))] = path.read_bytes().decode("latin-1")

    def rows(self, url: str) -> None:
        engine = sa.create_engine(url)
        with engine.connect() as conn:
            for table in sa.inspect(engine).get_table_names():
                found = conn.exec_driver_sql(f'SELECT * FROM "{table}"').fetchall()
                self.texts[f"table {table}"] = repr(found)
        engine.dispose()

    def answers(self, url: str, key: str, job: str) -> None:
        with httpx2.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}) as http:
            paths = ["", "/events", "/logs", "/report", "/bit-width-map", "/files"]
            calls = [f"/v1/jobs/{job}{path}" for path in paths]
            calls += ["/v1/jobs", "/v1/keys", "/v1/workers", "/v1/profiles", "/openapi.json"]
            for call in calls:
                answer = http.get(call, timeout=30)
                self.texts[f"answer {call}"] = f"{answer.headers}\n{answer.text}"
            refused = http.get("/v1/jobs", headers={"Authorization": f"Bearer {OWN_TOKEN}"})
            assert refused.status_code == 401
            self.texts["refusal"] = f"{refused.headers}\n{refused.text}"

    def leaks(self) -> list[str]:
        return [
            f"{name} in {place}"
            for place, text in self.texts.items()
            for name, secret in self.secrets.items()
            if secret in text
        ]


def new_key(url: str, *, fresh: bool = False) -> str:
    """An admin's key, in a database that is made first where it is `fresh`."""
    database = Database(url)
    try:
        if fresh:
            upgrade(database)
        return KeyStore(database).create("canary", scopes=["admin"])[0]
    finally:
        database.close()


def submitted(client: Client, url: str, key: str, spec: dict[str, Any], hook: str) -> str:
    """A job that tells an address when it has ended."""
    headers = {"Authorization": f"Bearer {key}", "Webhook-URL": hook}
    answer = httpx2.post(f"{url}/v1/jobs", json=spec, headers=headers, timeout=60)
    assert answer.status_code == 202, answer.text
    job = client.wait(answer.json()["id"], timeout=240)
    assert job.state == "succeeded"
    return job.id


@pytest.mark.e2e
def test_a_run_of_the_embedded_service_leaves_no_secret(tmp_path: Path) -> None:
    data, log = tmp_path / "data", tmp_path / "serve.log"
    model = tiny_llama(tmp_path / "tiny")
    hub = FaultyHub({file.name: file.read_bytes() for file in model.iterdir()})
    store = FaultyHub(hub.files)
    settings = Settings(data=data)
    data.mkdir()
    key = new_key(settings.database, fresh=True)
    given = {
        "BITMILL_HUB_TOKEN": HUB_TOKEN,
        "BITMILL_HUB_ENDPOINT": hub.url,
        "BITMILL_MODEL_ROOTS": json.dumps({"models": str(with_text(tmp_path))}),
        "BITMILL_WEBHOOK_SECRET": HOOK_SECRET,
        "BITMILL_WEBHOOK_PRIVATE": "true",
        "BITMILL_LOG_LEVEL": "DEBUG",
    }
    line = [sys.executable, "-P", "-m", "bitmill_service.cli.main", "serve", "--json"]
    with serving(hub), serving(store), listening() as other, log.open("wb") as said:
        hub.elsewhere = store.url
        process = subprocess.Popen(
            [*line, "--port", "0", "--data", str(data)],
            env=os.environ | FORKED | given,
            stdout=subprocess.PIPE,
            stderr=said,
        )
        try:
            assert process.stdout is not None
            told = b"".join(iter(process.stdout.readline, b"}\n")) + b"}"
            url = json.loads(told)["url"]
            run = Run({"key": key, "hub token": HUB_TOKEN, "hook": HOOK_SECRET, "own": OWN_TOKEN})
            with Client(url, api_key=key) as client:
                spec = SPEC | {"model": {"source": "hub", "repo_id": "org/tiny"}}
                job = submitted(client, url, key, spec, f"{other.url}/hook")
                client.download(job, tmp_path / "got")
            wait_for(lambda: other.heard, "the webhook", 60)
            run.answers(url, key, job)
        finally:
            process.terminate()
            process.communicate(timeout=60)
    assert any(one.authorized for one in hub.requests), "the token was to be used"
    assert store.requests
    assert not any(one.authorized for one in store.requests)
    run.folder(data)
    run.folder(tmp_path / "got")
    run.texts |= {"log": log.read_text(), "webhook": "\n".join(other.heard)}
    run.rows(settings.database)
    assert len(run.texts) > 30
    assert run.leaks() == []


@pytest.mark.e2e
def test_a_run_of_the_production_stack_leaves_no_secret(tmp_path: Path) -> None:
    tiny_llama(with_text(tmp_path) / "tiny")
    given = {
        "BITMILL_HUB_TOKEN": HUB_TOKEN,
        "BITMILL_WEBHOOK_PRIVATE": "true",
        "BITMILL_LOG_LEVEL": "DEBUG",
    }
    with listening() as other, native_stack(tmp_path, **given) as stack:
        words = Path(f"/proc/{stack['pids']['api-0']}/environ").read_text().split("\0")
        environment = dict(word.partition("=")[::2] for word in words if word)
        database = environment["BITMILL_DATABASE_URL"]
        key = new_key(database)
        run = Run(
            {
                "key": key,
                "hub token": HUB_TOKEN,
                "own": OWN_TOKEN,
                "hook": environment["BITMILL_WEBHOOK_SECRET"],
                "object store": environment["BITMILL_S3_SECRET_KEY"],
                "broker": re.findall(r"redis://:(\w+)@", environment["BITMILL_BROKER_URL"])[0],
                "database": re.findall(r"bitmill:(\w+)@", database)[0],
            }
        )
        with Client(stack["url"], api_key=key) as client:
            spec = SPEC | {"model": {"source": "path", "path": "models/tiny"}, "label": "steps=2"}
            job = submitted(client, stack["url"], key, spec, f"{other.url}/hook")
            client.download(job, tmp_path / "got")
        wait_for(lambda: other.heard, "the webhook", 60)
        run.answers(stack["url"], key, job)
        run.rows(database)
        run.folder(Path(stack["data"]), without="redis.conf")
        run.folder(tmp_path / "got")
        run.texts["webhook"] = "\n".join(other.heard)
    assert "canary" in run.texts["table api_keys"]
    assert len(run.texts) > 30
    assert run.leaks() == []


def test_a_secret_that_is_left_is_found(tmp_path: Path) -> None:
    run = Run({"hub token": HUB_TOKEN})
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "log").write_bytes(b"\xff\0" + HUB_TOKEN.encode())
    run.folder(tmp_path)
    assert run.leaks() == ["hub token in a/log"]
