"""What the API costs and how long it takes, alone and beside others: one JSON object.

    PYTHONPATH=tests python benchmarks/front_door.py calls     CPU of status and submit, 1 minute
    PYTHONPATH=tests python benchmarks/front_door.py download  3 GB against nginx, 1 minute
    PYTHONPATH=tests python benchmarks/front_door.py beside    status beside downloads, 1 minute
    PYTHONPATH=tests python benchmarks/front_door.py polls     50 polls a second, 5 minutes
    PYTHONPATH=tests python benchmarks/front_door.py slow      1,500 slow connections, 1 minute
    PYTHONPATH=tests python benchmarks/front_door.py restarts  downloads over restarts, 1 minute

The service is `bitmill serve --no-worker` in a process of its own, with a finished job, on
loopback; clients are in this process. CPU seconds are those of the service's processes, user and
system. `calls` runs the code of `--base`, the commit before the front door, beside this one: in
turn, in the same run. Load average and cores are in the result: times mean little on a busy
machine. Needs psutil, for `download` also nginx; `restarts` and `download` write 3 GB at most.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import httpx2
import psutil

from bitmill_service.client.client import Client
from bitmill_service.main import create_app
from bitmill_service.settings import ServiceSettings
from bitmill_workers.store.keys import KeyStore
from bitmill_workers.store.migrate import upgrade
from finished import Stack, spec_json
from servers import free_port, listens
from stores import wait_for
from tiny import tiny_llama

PACKAGES = ("kernels", "quant_core", "workers", "service")
HERE = Path(__file__).parents[1]
NGINX = shutil.which("nginx") or "/usr/sbin/nginx"
HALF = b"GET /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer "
_NGINX = """
worker_processes 1; pid {folder}/pid; error_log stderr; events {{}}
http {{
    access_log off; sendfile on; client_body_temp_path {folder}/b; proxy_temp_path {folder}/p;
    fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
    server {{ listen 127.0.0.1:{port}; location / {{ root {root}; }} }}
}}
"""


class Service:
    """A service in a process of its own: its address, its CPU seconds and its memory."""

    def __init__(self, data: Path, models: Path, *, code: Path = HERE, files: int = 8192) -> None:
        self.port, self._log = free_port(), data.with_suffix(".log").open("ab")
        self._line = [
            *(sys.executable, "-P", "-m", _command(code), "serve", "--no-worker"),
            *("--port", str(self.port), "--data", str(data), "--models", f"models={models}"),
        ]
        self._environment = os.environ | {
            "PYTHONPATH": ":".join(str(code / package) for package in PACKAGES),
            "BITMILL_MAX_QUEUED": "1000000",
            "BITMILL_TENANT_QUEUED": "1000000",
            "BITMILL_CALLS_PER_MINUTE": "10000000",
            "BITMILL_SKELETON_CHECK_S": "60",  # asked once, in the turn that warms
        }
        self._files = files
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = self._start()

    def _start(self) -> psutil.Popen:
        limited = ["bash", "-c", f'ulimit -n {self._files}; exec "$@"', "bash", *self._line]
        process = psutil.Popen(limited, env=self._environment, stdout=self._log, stderr=self._log)
        wait_for(lambda: listens(self.port), "the service", 60)
        return process

    def cpu(self) -> float:
        """CPU seconds until now, of its children too."""
        return cpu_of([self.process, *self.process.children(recursive=True)])

    def memory(self) -> int:
        """Resident bytes."""
        return int(self.process.memory_info().rss)

    def kill_and_start(self, pause: float) -> None:
        """End it without a word, and start it again."""
        self.process.kill()
        self.process.wait()
        time.sleep(pause)
        self.process = self._start()

    def stop(self) -> None:
        """End it in good order."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        self._log.close()


def _command(code: Path) -> str:
    """The module of the command line, which has moved since the oldest code."""
    moved = (code / "service" / "bitmill_service" / "cli" / "main.py").exists()
    return "bitmill_service.cli.main" if moved else "bitmill_service.cli"


def cpu_of(processes: Sequence[psutil.Process]) -> float:
    """CPU seconds, user and system, of processes and of their dead children."""
    return math.fsum(math.fsum(process.cpu_times()[:4]) for process in processes)


@contextmanager
def serving(place: Path, weights: int = 0, keys: bool = True, **options: Any) -> Iterator[Any]:
    """A service with a finished job of one file of so many bytes: it, the job's id and a key."""
    data, models = place / "data", place / "models"
    tiny_llama(models / "tiny")
    app = create_app(ServiceSettings(data=data, model_roots={"models": models}))
    context = app.state.context
    upgrade(context.database)
    stack = Stack("", context)
    job = stack.succeeded()
    if weights:
        job = _with_file(stack, weights)
    key = None
    if keys:
        key, _ = KeyStore(context.database).create("all", scopes=["admin"], tenant="local")
    context.database.close()
    service = Service(data, models, **options)
    try:
        yield service, job.id, key
    finally:
        service.stop()


def _with_file(stack: Stack, size: int) -> Any:
    """A finished job whose weights are random blocks, all different."""
    block = bytearray(os.urandom(64 << 20))
    data = bytearray()
    while len(data) < size:
        block[:8] = len(data).to_bytes(8, "little")
        data += block
    return stack.succeeded(bytes(data[:size]))


def client(url: str, key: str | None) -> httpx2.Client:
    """One connection."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx2.Client(base_url=url, headers=headers, timeout=120)


def seconds(call: Callable[[], httpx2.Response]) -> float:
    """How long an answer took; it must be a success."""
    started = time.perf_counter()
    call().raise_for_status()
    return time.perf_counter() - started


def in_ms(times: Sequence[float]) -> dict[str, float]:
    """Quantiles in milliseconds."""
    ordered = sorted(times)
    return {
        "calls": len(ordered),
        "p50_ms": round(1000 * ordered[len(ordered) // 2], 2),
        "p99_ms": round(1000 * ordered[min(len(ordered) - 1, math.ceil(0.99 * len(ordered)))], 2),
        "max_ms": round(1000 * ordered[-1], 2),
    }


def calls(place: Path, options: argparse.Namespace) -> dict[str, Any]:
    """CPU of a status call and of a submit: old code, this one, this one with a key; in turn."""
    old = place / "old" / "code"
    old.mkdir(parents=True)
    archive = subprocess.run(
        ["git", "archive", options.base, *PACKAGES], cwd=HERE, capture_output=True, check=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(old, filter="data")
    told: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as open_:
        services: dict[str, tuple[Service, str | None]] = {}
        tiny_llama(place / "old" / "models" / "tiny")
        before = Service(place / "old" / "data", place / "old" / "models", code=old)
        open_.callback(before.stop)
        services["old"] = before, None
        for name in ("new", "new with a key"):
            service, _, key = open_.enter_context(serving(place / name, keys=name != "new"))
            services[name] = service, key
        for turn in range(options.turns + 1):
            for name, (service, key) in services.items():
                found = _turn(service, key, turn, options.calls)
                if turn:  # the first warms caches
                    for what, value in found.items():
                        told.setdefault(name, {}).setdefault(what, []).append(value)
    means = {
        name: {what: round(median(values), 3) for what, values in found.items()}
        for name, found in told.items()
    }
    return {
        "base": options.base,
        "server_cpu_ms": means,
        "over_old": {
            name: {what: round(value / means["old"][what], 3) for what, value in found.items()}
            for name, found in means.items()
            if name != "old"
        },
    }


def _turn(service: Service, key: str | None, turn: int, count: int) -> dict[str, float]:
    """CPU milliseconds of the server for one call of each kind."""
    found = {}
    with client(service.url, key) as http:
        body = spec_json()
        job = http.post("/v1/jobs", json=body).raise_for_status().json()["id"]

        def submit(number: int) -> httpx2.Response:
            return http.post("/v1/jobs", json=body | {"label": f"{turn} {number}"})

        kinds: dict[str, Callable[[int], httpx2.Response]] = {
            "status": lambda _: http.get(f"/v1/jobs/{job}"),
            "submit": submit,
        }
        for what, call in kinds.items():
            before = service.cpu()
            for number in range(count):
                call(number).raise_for_status()
            found[what] = 1000 * (service.cpu() - before) / count
    return found


def fetch(url: str, key: str | None, until: float = math.inf, rate: float = math.inf) -> int:
    """Read an answer's bytes away, at most `rate` a second; how many."""
    host = httpx2.URL(url)
    buffer, count, started = bytearray(4 << 20), 0, time.perf_counter()
    with socket.create_connection((host.host, host.port or 80)) as link:
        head = f"GET {host.raw_path.decode()} HTTP/1.1\r\nHost: {host.host}\r\n"
        head += f"Authorization: Bearer {key}\r\n" if key else ""
        link.sendall(f"{head}Connection: close\r\n\r\n".encode())
        while time.monotonic() < until and (got := link.recv_into(buffer)):
            count += got
            ahead = count / rate - (time.perf_counter() - started)
            if ahead > 0:
                time.sleep(ahead)
    return count


def download(place: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One client fetches one file from the page cache: the service, and nginx, in turn."""
    size = options.bytes
    with serving(place, size) as (service, job, key):
        file = next(
            path
            for path in (place / "data" / "artifacts").rglob("model.safetensors")
            if path.stat().st_size == size
        )
        port = free_port()
        config = place / "nginx.conf"
        config.write_text(_NGINX.format(folder=place, port=port, root=file.parent))
        user = "user root;" if os.getuid() == 0 else ""
        nginx = psutil.Popen([NGINX, "-c", str(config), "-g", f"daemon off; {user}"])
        try:
            wait_for(lambda: listens(port), "nginx")
            sources = {
                "service": f"{service.url}/v1/jobs/{job}/files/model.safetensors",
                "nginx": f"http://127.0.0.1:{port}/model.safetensors",
            }
            told: dict[str, list[tuple[float, float]]] = {name: [] for name in sources}
            for turn in range(options.turns + 1):
                for name, url in sources.items():
                    owner = [nginx, *nginx.children()] if name == "nginx" else [service.process]
                    cpu, started = cpu_of(owner), time.perf_counter()
                    assert fetch(url, key if name == "service" else None) >= size
                    took = time.perf_counter() - started
                    if turn:
                        told[name].append((size / took / 1e6, (cpu_of(owner) - cpu) / size * 1e9))
        finally:
            nginx.terminate()
            nginx.wait(20)
    found = {
        name: {
            "mb_s": [round(speed, 1) for speed, _ in runs],
            "cpu_s_a_gb": [round(cpu, 3) for _, cpu in runs],
        }
        for name, runs in told.items()
    }
    speed = {name: median(speed for speed, _ in runs) for name, runs in told.items()}
    spent = {name: median(cpu for _, cpu in runs) for name, runs in told.items()}
    return found | {
        "bytes": size,
        "speed_over_nginx": round(speed["service"] / speed["nginx"], 3),
        "cpu_over_nginx": round(spent["service"] / spent["nginx"], 3),
    }


def beside(place: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Status calls alone, and beside four downloads of at most 50 MB/s each."""
    with serving(place, 512 << 20) as (service, job, key), client(service.url, key) as http:
        url = f"{service.url}/v1/jobs/{job}/files/model.safetensors"

        def watched() -> list[float]:
            found = []
            until = time.monotonic() + options.seconds
            while time.monotonic() < until:
                found.append(seconds(lambda: http.get(f"/v1/jobs/{job}")))
                time.sleep(0.01)
            return found

        watched()
        alone = watched()
        until = time.monotonic() + options.seconds + 2

        def load(_: int) -> int:
            count = 0
            while time.monotonic() < until:
                count += fetch(url, key, until, 50e6)
            return count

        with ThreadPoolExecutor(4) as pool:
            loads = [pool.submit(load, number) for number in range(4)]
            time.sleep(1)
            together = watched()
            sent = sum(one.result() for one in loads)
    return {
        "alone": in_ms(alone),
        "beside": in_ms(together),
        "p99_ratio": round(in_ms(together)["p99_ms"] / in_ms(alone)["p99_ms"], 3),
        "downloaded_mb_s": round(sent / (options.seconds + 2) / 1e6, 1),
    }


def polls(place: Path, options: argparse.Namespace) -> dict[str, Any]:
    """50 status calls a second, 20 event streams and two downloads, for some minutes."""
    with serving(place, 256 << 20) as (service, job, key), ExitStack() as open_:
        with client(service.url, key) as http:
            waiting = http.post("/v1/jobs", json=spec_json()).raise_for_status().json()["id"]
        until = time.monotonic() + options.minutes * 60
        stop = threading.Event()

        def listen(_: int) -> int:
            count = 0
            with client(service.url, key) as http:
                headers = {"Accept": "text/event-stream"}
                path = f"/v1/jobs/{waiting}/events"
                with http.stream("GET", path, headers=headers) as answer:
                    for _line in answer.iter_lines():
                        count += 1
                        if stop.is_set():
                            break
            return count

        def load(_: int) -> None:
            url = f"{service.url}/v1/jobs/{job}/files/model.safetensors"
            while time.monotonic() < until:
                fetch(url, key, until, 20e6)

        pool = open_.enter_context(ThreadPoolExecutor(32))
        running: list[Future[Any]] = [pool.submit(listen, number) for number in range(20)]
        running += [pool.submit(load, number) for number in range(2)]
        http = open_.enter_context(client(service.url, key))
        times, memory, late, cpu = [], [], 0, service.cpu()
        started = due = time.monotonic()
        while due < until:
            late += time.monotonic() > due + 1
            time.sleep(max(0.0, due - time.monotonic()))
            times.append(seconds(lambda: http.get(f"/v1/jobs/{waiting}")))
            if len(times) % 500 == 1:
                memory.append(round(service.memory() / 1e6, 1))
            due += 0.02
        cpu = (service.cpu() - cpu) / (time.monotonic() - started)
        stop.set()
        http.post(f"/v1/jobs/{waiting}/cancel").raise_for_status()
        for one in running:
            one.result()
    return in_ms(times) | {
        "minutes": options.minutes,
        "calls_a_second_late": late,
        "server_cores": round(cpu, 3),
        "memory_mb": memory,
    }


def slow(place: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Status calls while 1,500 connections send nothing, half a request, or a byte now and then."""
    with serving(place, files=1024) as (service, job, key), ExitStack() as open_:
        with client(service.url, key) as http:
            alone = [seconds(lambda: http.get(f"/v1/jobs/{job}")) for _ in range(50)]
        starts = (b"", HALF[:20], HALF + key.encode()[:10], HALF + key.encode() + b"\r\n\r\n")
        links: list[socket.socket] = []
        stop = threading.Event()

        def crowd() -> None:
            while not stop.is_set():
                if len(links) < options.connections:
                    link = socket.create_connection(("127.0.0.1", service.port), timeout=20)
                    links.append(open_.enter_context(link))
                    link.sendall(starts[len(links) % len(starts)])
                    continue
                stop.wait(0.5)
                for number, link in enumerate(links):
                    try:
                        if number % 4 == 2:
                            link.sendall(b"x")  # drips
                    except OSError:
                        links[number] = socket.create_connection(("127.0.0.1", service.port))
                        open_.enter_context(links[number])

        thread = threading.Thread(target=crowd)
        thread.start()
        times = []
        try:
            wait_for(lambda: len(links) >= options.connections, "all connections", 120)
            until = time.monotonic() + options.seconds
            while time.monotonic() < until:
                with client(service.url, key) as http:  # a new connection each
                    times.append(seconds(lambda: http.get(f"/v1/jobs/{job}")))
                time.sleep(0.05)
        finally:
            stop.set()
            thread.join()
    return {"connections": len(links), "alone": in_ms(alone), "meanwhile": in_ms(times)}


def restarts(place: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Eight downloads at once into folders of their own while the service is killed three times."""
    size = 256 << 20
    with serving(place, size) as (service, job, key):
        wanted = hashlib.sha256()
        source = next(
            path
            for path in (place / "data" / "artifacts").rglob("model.safetensors")
            if path.stat().st_size == size
        )
        with source.open("rb") as file:
            while chunk := file.read(1 << 24):
                wanted.update(chunk)

        def get(number: int) -> str:
            target = place / f"got-{number}"
            with Client(service.url, api_key=key) as http:
                http.download(job, target)
            with (target / "model.safetensors").open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()

        started, killed_at = time.monotonic(), []
        with ThreadPoolExecutor(8) as pool:
            running = [pool.submit(get, number) for number in range(8)]
            for _ in range(3):
                enough = _bytes_below(place) + (64 << 20)
                wait_for(partial(_has_more, place, enough), "downloads", 120)
                killed_at.append(_bytes_below(place))
                service.kill_and_start(1.0)
            right = sum(one.result() == wanted.hexdigest() for one in running)
        return {
            "downloads": 8,
            "right": right,
            "bytes_each": size,
            "bytes_when_killed": killed_at,
            "seconds": round(time.monotonic() - started, 1),
        }


def _has_more(place: Path, least: int) -> bool:
    """Whether more than `least` bytes have been fetched."""
    return _bytes_below(place) > least


def _bytes_below(place: Path) -> int:
    """Bytes of all that has been fetched."""
    total = 0
    for path in place.glob("got-*/*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # it has just got its name
            continue
    return total


def main() -> int:
    """Measure one thing and print it."""
    kinds = {one.__name__: one for one in (calls, download, beside, polls, slow, restarts)}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=kinds)
    parser.add_argument("--base", default="7c5cfe5", help="commit that `calls` compares with")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--calls", type=int, default=200, help="of each kind in a turn")
    parser.add_argument("--bytes", type=int, default=3 << 30, help="of the file of `download`")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--connections", type=int, default=1500)
    options = parser.parse_args()
    before = os.getloadavg()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        found = kinds[options.what](Path(scratch), options)
    machine = {"cores": os.cpu_count(), "load_before": before, "load_after": os.getloadavg()}
    print(json.dumps({options.what: found, "machine": machine}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
