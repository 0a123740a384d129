"""`bitmill serve` as a real process with a real worker, around a runner that acts on command."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from bitmill_service.client.client import Client
from bitmill_service.embedded.server import EmbeddedService, ServeError, bind
from bitmill_service.settings import ServiceSettings
from finished import spec_json
from stores import alive, wait_for

TESTS = Path(__file__).parents[1]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "bitmill_service.cli.main", *arguments]


class Served:
    """A running `bitmill serve`."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process, self.url = process, url

    def family(self) -> list[int]:
        """Process ids of the service and everything below it."""
        me = psutil.Process(self.process.pid)
        return [me.pid, *(child.pid for child in me.children(recursive=True))]

    def worker(self) -> psutil.Process:
        for child in psutil.Process(self.process.pid).children():
            if "bitmill_service.embedded.worker_process" in child.cmdline():
                return child
        raise LookupError("no worker")


@contextmanager
def served(data: Path, models: Path, port: int = 0, **environment: str) -> Iterator[Served]:
    arguments = ["--data", str(data), "--port", str(port)]
    arguments += ["--models", f"models={models}", "--json"]
    process = subprocess.Popen(
        command("serve", *arguments),
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
            "BITMILL_RUNNER_MODULE": "acting_runner",
            "BITMILL_LEASE_S": "4",
            "BITMILL_RENEW_S": "0.5",
            "BITMILL_POLL_S": "0.05",
            "BITMILL_RESEND_S": "1",
            "BITMILL_RECONCILE_S": "0.5",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        text = ""
        for line in lines:
            text += line
            if line == "}\n":
                break
        else:
            raise AssertionError(process.communicate()[1])
        yield Served(process, json.loads(text)["url"])
    finally:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=60)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


def submit(client: Client, label: str) -> str:
    return client.submit(spec_json(label=label)).id


def test_job_runs_and_stop_leaves_no_process(data: Path, models: Path, tmp_path: Path) -> None:
    with served(data, models) as service, Client(service.url) as client:
        done = client.wait(submit(client, "steps=3"), timeout=60)
        assert done.result == {"steps": 3, "made": 3}
        fetched = client.download(done.id, tmp_path / "out").fetched
        assert {"MANIFEST.json", "SHA256SUMS", "model.safetensors"} <= set(fetched)
        running = submit(client, "steps=1000 sleep=0.05")
        wait_for(lambda: client.get(running).progress is not None, "the second job's progress")
        family = service.family()
        assert len(family) >= 4
        with client._http.stream(
            "GET", f"/v1/jobs/{running}/events", headers={"Accept": "text/event-stream"}
        ) as stream:
            next(stream.iter_bytes())
            service.process.send_signal(signal.SIGTERM)
            assert service.process.wait(30) == 0
    wait_for(lambda: not any(map(alive, family)), "all processes to end")
    settings = ServiceSettings(data=data, port=0)
    with EmbeddedService(settings, worker=False) as again, Client(again.url) as client:
        assert client.get(running).state == "queued"


def test_commands_that_follow_a_job_outlive_a_killed_service(
    data: Path, models: Path, tmp_path: Path
) -> None:
    with served(data, models) as first, Client(first.url) as client:
        url = first.url
        job = submit(client, "steps=100 sleep=0.1")
        words = (["wait", job], ["logs", job, "--follow"])
        following = []
        for number, each in enumerate(words):
            with (tmp_path / f"{number}.txt").open("w") as said:
                follower = command(*each, "--url", url)
                following.append(subprocess.Popen(follower, stdout=said, stderr=subprocess.STDOUT))
        wait_for(lambda: all((tmp_path / f"{n}.txt").read_text() for n in range(2)), "output")
        first.process.kill()
        first.process.wait()
    wait_for(
        lambda: all("trying again" in (tmp_path / f"{n}.txt").read_text() for n in range(2)),
        "words about the outage",
    )
    with served(data, models, int(url.rpartition(":")[2])):
        assert [process.wait(100) for process in following] == [0, 0]
    assert "job succeeded" in (tmp_path / "0.txt").read_text()
    assert (tmp_path / "1.txt").read_text().count("starts") == 2


def test_killed_worker_is_replaced_and_finished_steps_are_kept(data: Path, models: Path) -> None:
    with served(data, models) as service, Client(service.url) as client:
        job = submit(client, "steps=40 sleep=0.05")
        wait_for(lambda: (p := client.get(job).progress) is not None and p.done > 3, "progress")
        worker = service.worker()
        below = [child.pid for child in worker.children(recursive=True)]
        worker.kill()
        done = client.wait(job, timeout=90)
        assert done.attempt >= 2
        assert done.result is not None
        assert 0 < done.result["made"] < 40
        assert service.worker().pid != worker.pid
        assert not any(map(alive, below))


def test_killed_service_takes_its_worker_with_it(data: Path, models: Path) -> None:
    with served(data, models) as service, Client(service.url) as client:
        job = submit(client, "steps=1000 sleep=0.05")
        wait_for(lambda: client.get(job).progress is not None, "progress")
        family = service.family()
        service.process.kill()
        wait_for(lambda: not any(map(alive, family)), "all processes to end")
    with served(data, models) as service, Client(service.url) as client:
        wait_for(lambda: client.get(job).attempt >= 2, "the job to run again")
        client.cancel(job)
        wait_for(lambda: client.get(job).state == "cancelled", "the cancel")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=60)


def test_second_service_and_second_worker_are_refused(data: Path, models: Path) -> None:
    with served(data, models) as service:
        wait_for(lambda: (data / "worker.lock").exists(), "the worker's lock")
        second = run("serve", "--data", str(data), "--port", "0")
        assert second.returncode == 2
        assert f"in use by process {service.process.pid} at {service.url}" in second.stderr
        worker = run("worker", "--data", str(data), "--json")
        assert worker.returncode == 2
        assert json.loads(worker.stderr)["error"]["code"] == "data_folder_in_use"


def test_port_in_use_is_refused_and_nothing_is_left(data: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = run("serve", "--data", str(data), "--port", str(port))
    assert refused.returncode == 2
    assert f"port {port} on 127.0.0.1 is in use" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert [path.name for path in data.iterdir()] == ["lock"]


def test_address_of_another_machine_cannot_be_bound() -> None:
    with pytest.raises(ServeError, match=r"192\.0\.2\.1"):
        bind("192.0.2.1", 0)


def test_default_address_is_loopback(data: Path) -> None:
    with EmbeddedService(ServiceSettings(data=data, port=0), worker=False) as service:
        assert service.url.startswith("http://127.0.0.1:")
        facts: dict[str, Any] = json.loads((data / "lock").read_text())
        assert facts == {"pid": os.getpid(), "url": service.url}
        assert oct((data).stat().st_mode & 0o777) == "0o700"
