"""Short runs of the nemesis, and what must hold while Redis is away or a clock is wrong."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import httpx2
import pytest

from bitmill_service.main import create_app
from bitmill_service.settings import ServiceSettings
from bitmill_workers.messaging.app import Dispatcher
from bitmill_workers.settings import Settings
from bitmill_workers.store.db import Database
from bitmill_workers.store.jobs import JobStore
from bitmill_workers.store.migrate import upgrade
from servers import Postgres, Redis
from serving import serve
from stores import spec, start_worker, wait_for
from tcp_proxy import TcpProxy
from tiny import tiny_llama

ROOT = Path(__file__).parents[3]
FAKETIME = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))


def need_servers() -> None:
    if not (Redis.program and Postgres.programs):
        pytest.skip("needs the Debian packages redis-server and postgresql")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("stack", ["production", "embedded"])
def test_every_invariant_holds_under_seeded_faults(stack: str) -> None:
    if stack == "production":
        need_servers()
    amount = ["--jobs", "20", "--workers", "2", "--faults", "10", "--seed", "11"]
    run = subprocess.run(
        [str(ROOT / "scripts" / "nemesis"), "--stack", stack, *amount],
        capture_output=True,
        text=True,
        timeout=590,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_submitting_does_not_wait_for_a_silent_broker(tmp_path: Path) -> None:
    need_servers()
    redis = Redis(tmp_path / "redis")
    redis.start()
    proxy = TcpProxy(redis.port)
    tiny_llama(tmp_path / "models" / "tiny")
    settings = ServiceSettings(
        data=tmp_path / "data",
        model_roots={"models": tmp_path / "models"},
        broker_url=f"redis://127.0.0.1:{proxy.port}/0",
        reconcile_s=0.3,
        resend_s=0.5,
    )
    app = create_app(settings)
    upgrade(app.state.context.database)
    body = {
        "model": {"source": "path", "path": "models/tiny"},
        "budget": {"code_bits": 4},
        "allocation": {"method": "uniform"},
    }
    with serve(app) as url, httpx2.Client(base_url=url, timeout=30) as client:

        def slowest(count: int) -> float:
            times = []
            for _ in range(count):
                began = time.monotonic()
                assert client.post("/v1/jobs", json=body).status_code == 202
                times.append(time.monotonic() - began)
            return sorted(times)[int(0.99 * (count - 1))]

        with_broker = slowest(30)
        proxy.freeze()
        without_broker = slowest(100)
        assert without_broker < 1 + with_broker
        proxy.thaw()
        store = JobStore(app.state.context.database)
        waiting = store.counts()["queued"]
        assert waiting == 130

        def unsent() -> list[str]:
            return [j.id for j in store.list(limit=200).jobs if j.sent_at is None]

        wait_for(lambda: not unsent(), "every job's message", 60)
    proxy.close()
    redis.kill()


def test_wrong_clock_of_a_worker_changes_no_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_servers()
    if not FAKETIME:
        pytest.skip("needs the Debian package libfaketime")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests")]))
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "models" / "tiny" / "model.safetensors").write_bytes(b"weights")
    redis, postgres = Redis(tmp_path / "redis"), Postgres()
    redis.start()
    postgres.start()
    settings = Settings(
        data=tmp_path / "data",
        database_url=postgres.database(),
        broker_url=redis.url,
        model_roots={"models": tmp_path / "models"},
        runner_module="acting_runner",
        worker_name="skewed",
        queues=("cpu",),
        lease_s=6.0,
        renew_s=0.5,
        poll_s=0.1,
    )
    database = Database(settings.database)
    upgrade(database)
    store = JobStore(database)
    dispatcher = Dispatcher(settings, store.mark_sent)
    monkeypatch.setenv("LD_PRELOAD", str(FAKETIME[0]))
    monkeypatch.setenv("FAKETIME", "+600s")
    monkeypatch.setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1")
    worker = start_worker(settings, tmp_path / "log")
    monkeypatch.delenv("LD_PRELOAD")
    try:
        job = store.submit(spec(label="steps=20 sleep=0.1")).job
        dispatcher.notify(job.id, job.queue)
        wait_for(lambda: store.get(job.id).state == "running", "the claim")
        lease = store.get(job.id).lease_until
        assert lease is not None
        assert 0 < lease - database.now() <= settings.lease_s
        wait_for(lambda: store.get(job.id).finished, "the end")
        done = store.get(job.id)
        assert (done.state, done.attempt, done.lost_count) == ("succeeded", 1, 0)
    finally:
        worker.terminate()
        worker.wait(60)
        dispatcher.close()
        database.close()
        redis.kill()
        postgres.destroy()
