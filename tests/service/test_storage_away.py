"""Whether a service is ready whose object store hangs, is gone or refuses."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from pydantic import SecretStr

from bitmill_service.main import create_app
from bitmill_service.settings import ServiceSettings
from bitmill_workers.storage import s3
from bitmill_workers.store.migrate import upgrade
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
        proxy.thaw()  # the reconciler may be listing the bucket


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
