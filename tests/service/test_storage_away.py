"""Whether a service is ready whose object store hangs, is gone or refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from pydantic import SecretStr

from bitmill_service.main import create_app, make_context
from bitmill_service.settings import ServiceSettings
from bitmill_workers.storage import s3
from bitmill_workers.store.migrate import upgrade
from finished import Stack
from servers import free_port
from serving import serve
from stores import wait_for
from tcp_proxy import TcpProxy

moto = pytest.importorskip("moto.server", reason="moto is not installed")

PROBES = 20


@pytest.fixture
def proxy() -> Iterator[TcpProxy]:
    """In front of an object store."""
    running = moto.ThreadedMotoServer("127.0.0.1", free_port(), verbose=False)
    running.start()
    between = TcpProxy(running.get_host_and_port()[1])
    yield between
    between.close()
    running.stop()


def settings(data: Path, proxy: TcpProxy, bucket: str) -> ServiceSettings:
    return ServiceSettings(
        data=data,
        s3_bucket=bucket,
        s3_endpoint=f"http://127.0.0.1:{proxy.port}",
        s3_access_key="key",
        s3_secret_key=SecretStr("not-a-default"),
    )


@pytest.fixture
def http(tmp_path: Path, proxy: TcpProxy) -> Iterator[httpx2.Client]:
    app = create_app(settings(tmp_path, proxy, "results"))
    upgrade(app.state.context.database)
    app.state.context.artifacts.prepare()
    with serve(app) as url, httpx2.Client(base_url=url, timeout=60) as client:
        yield client


def storage(http: httpx2.Client) -> str:
    answer = http.get("/readyz")
    checks = answer.json()["checks"]
    assert (checks["database"], checks["disk"]) == ("ok", "ok")
    assert (answer.status_code, answer.json()["ready"]) == (
        (200, True) if checks["storage"] == "ok" else (503, False)
    )
    return str(checks["storage"])


def test_a_store_that_hangs_is_told_in_time_until_it_answers(
    http: httpx2.Client, proxy: TcpProxy
) -> None:
    assert storage(http) == "ok"
    proxy.freeze()
    wait_for(lambda: storage(http) != "ok", "the silence to be noticed", timeout=30)
    assert "the object store does not answer" in storage(http)
    assert http.get("/v1/jobs").status_code == 200
    proxy.thaw()
    wait_for(lambda: storage(http) == "ok", "the store", timeout=30)


def test_many_probes_share_one_answer(
    http: httpx2.Client, proxy: TcpProxy, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.freeze()
    began = time.monotonic()
    with ThreadPoolExecutor(PROBES) as pool:
        told = list(pool.map(lambda _: storage(http), range(PROBES)))
    assert time.monotonic() - began < 2 * (s3.CHECK_CONNECT_S + s3.CHECK_ANSWER_S)
    assert all("does not answer" in one for one in told)
    assert caplog.text.count("bucket results cannot be listed") == 1


def test_a_probe_soon_after_another_does_not_ask(http: httpx2.Client, proxy: TcpProxy) -> None:
    assert storage(http) == "ok"
    began = time.monotonic()
    proxy.close()
    assert storage(http) == "ok" or time.monotonic() - began > s3.CHECK_KEEP_S
    wait_for(lambda: storage(http) != "ok", "the closed port to be noticed", timeout=30)


def test_a_bucket_that_is_not_there_is_not_ready(
    tmp_path: Path, proxy: TcpProxy, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(settings(tmp_path, proxy, "absent"))
    upgrade(app.state.context.database)
    with serve(app) as url, httpx2.Client(base_url=url, timeout=60) as client:
        assert "refuses" in storage(client)
    assert "bucket absent cannot be listed: the object store answered NoSuchBucket" in caplog.text


STOPS_WITHIN_S = 15.0
"""What a stop takes where requests wait that nobody answers: 10 s for them, and the rest."""


def test_a_service_stops_while_the_store_hangs(tmp_path: Path, proxy: TcpProxy) -> None:
    """As a program, which ends only when none of its threads waits any more."""
    chosen = settings(tmp_path, proxy, "results")
    context = make_context(chosen)
    upgrade(context.database)
    context.artifacts.prepare()
    job = Stack("", context).succeeded()
    context.database.close()
    proxy.cut()
    proxy.freeze()
    command = [sys.executable, "-P", "-m", "bitmill_service.cli.main", "serve", "--no-worker"]
    command += ["--data", str(tmp_path), "--port", "0", "--json"]
    program = subprocess.Popen(
        command,
        env=os.environ
        | {
            "BITMILL_S3_BUCKET": "results",
            "BITMILL_S3_ENDPOINT": f"http://127.0.0.1:{proxy.port}",
            "BITMILL_S3_ACCESS_KEY": "key",
            "BITMILL_S3_SECRET_KEY": "not-a-default",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert program.stdout is not None
        url = json.loads("".join(iter(program.stdout.readline, "}\n")) + "}")["url"]
        wait_for(lambda: proxy.links >= 1, "the reconciler to ask")
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(httpx2.get, f"{url}/v1/jobs/{job.id}/bit-width-map", timeout=60)
            wait_for(lambda: proxy.links >= 2, "the request to ask")
            began = time.monotonic()
            program.send_signal(signal.SIGTERM)
            assert program.wait(60) == 0
            assert time.monotonic() - began < STOPS_WITHIN_S
            refused = asked.result()
            assert (refused.status_code, refused.json()["code"]) == (503, "stopping")
    finally:
        program.kill()
        _, log = program.communicate()
    assert "Traceback" not in log
