"""How a service as production runs it, by uvicorn, ends while clients listen to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx2

from bitmill_service.main import make_context
from bitmill_service.settings import ServiceSettings
from bitmill_workers.store.migrate import upgrade
from finished import Stack
from servers import free_port, listens
from stores import wait_for

DRAIN_S = 20
"""As in deploy/api.Dockerfile."""


def test_event_streams_end_when_the_service_stops(tmp_path: Path) -> None:
    context = make_context(ServiceSettings(data=tmp_path))
    upgrade(context.database)
    job = Stack("", context).queued()
    context.database.close()
    port = free_port()
    command = [sys.executable, "-P", "-m", "uvicorn"]
    command += ["--factory", "bitmill_service.main:create_app", "--port", str(port)]
    command += ["--http", "bitmill_service.http.connections:GuardedProtocol"]
    command += ["--timeout-graceful-shutdown", str(DRAIN_S)]
    program = subprocess.Popen(
        command,
        env=os.environ | {"BITMILL_DATA": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(lambda: listens(port), "the service")
        url = f"http://127.0.0.1:{port}/v1/jobs/{job.id}/events"
        asked = {"headers": {"Accept": "text/event-stream"}, "timeout": 60}
        with httpx2.Client() as client, client.stream("GET", url, **asked) as stream:
            chunks = stream.iter_bytes()
            next(chunks)
            began = time.monotonic()
            program.send_signal(signal.SIGTERM)
            for _ in chunks:
                pass
            program.wait(60)
        assert time.monotonic() - began < DRAIN_S / 2
    finally:
        program.kill()
        _, log = program.communicate()
    assert "Traceback" not in log
