"""The processes under test: servers, API replicas and workers that faults may kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import httpx2
import numpy as np
from safetensors.numpy import save_file

from bitmill.plan import parameters
from bitmill_workers.settings import Settings
from bitmill_workers.store.db import Database
from bitmill_workers.store.migrate import upgrade
from servers import Postgres, Redis, end_group, free_port, listens
from stores import environment_of, processes_of, wait_for
from tcp_proxy import TcpProxy

CANARY = "canary-7b1f"
"""A secret that every process is given and that must show up nowhere."""
_TESTS = Path(__file__).parents[2]


def make_model(folder: Path) -> None:
    """A Llama of one block of zeros whose headers pass admission; the acting runner never reads it.

    Without torch, which takes longer to load than a service to start.
    """
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 258,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    shapes = parameters.bounded(parameters.llama(parameters.Settings(config)))
    weights = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    del weights["lm_head.weight"]
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


class Stack(Protocol):
    """What the nemesis needs of a stack."""

    settings: Settings
    folder: Path

    def start(self) -> None:
        """Start everything."""

    def keep(self) -> None:
        """Start again what has ended; stands for the container engine."""

    def stop(self) -> None:
        """End everything, gracefully where it can."""

    @property
    def url(self) -> str:
        """Address of a living API."""

    def worker_pids(self) -> list[int]:
        """Process ids of the workers' main processes."""

    def api_pids(self) -> list[int]:
        """Process ids of the API's processes."""


def _settings(folder: Path, **fields: object) -> Settings:
    return Settings(
        data=folder / "data",
        model_roots={"models": folder / "models"},
        runner_module="acting_runner",
        hub_token=CANARY,
        lease_s=6.0,
        renew_s=1.0,
        poll_s=0.2,
        resend_s=5.0,
        reconcile_s=1.0,
        collect_s=1.0,
        stall_s=20.0,
        lost_retries=30,
        crash_retries=30,
        runner_file_bytes=1 << 20,
        **fields,
    )


def _environment(settings: Settings) -> dict[str, str]:
    env = os.environ | environment_of(settings)
    env["BITMILL_HUB_TOKEN"] = CANARY
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_TESTS), env.get("PYTHONPATH"))))
    return env


class ProductionStack:
    """PostgreSQL, Redis, two API replicas and any number of workers, all on loopback.

    API and workers reach both servers through proxies that can be frozen.
    """

    def __init__(self, folder: Path, *, workers: int, aof: bool = True) -> None:
        self.folder = folder
        self.postgres = Postgres()
        self.redis = Redis(folder / "redis", aof=aof)
        self._count = workers
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ports: dict[str, int] = {}
        self.stopping = False

    def start(self) -> None:
        """Servers first, then the schema, then two APIs and the workers."""
        self.redis.start()
        self.postgres.start()
        database = self.postgres.database()
        self.redis_proxy = TcpProxy(self.redis.port)
        self.postgres_proxy = TcpProxy(self.postgres.port)
        through = database.replace(str(self.postgres.port), str(self.postgres_proxy.port))
        self.settings = _settings(
            self.folder,
            database_url=through,
            broker_url=f"redis://127.0.0.1:{self.redis_proxy.port}/0",
            queues=("cpu", "gpu-24"),
        )
        self.direct = self.settings.model_copy(update={"database_url": database})
        opened = Database(database)
        upgrade(opened)
        opened.close()
        self.settings.data.mkdir(parents=True, exist_ok=True)
        (self.settings.data / "lives").touch()
        self.keep()
        wait_for(lambda: all(listens(p) for p in self._ports.values()), "the APIs", 60)

    def keep(self) -> None:
        """Start what is not running."""
        for number in range(2):
            self._keep_api(f"api-{number}")
        for number in range(self._count):
            name = f"worker-{number}"
            if self._ended(name):
                self._spawn(name, ["-m", "bitmill_workers.worker"], BITMILL_WORKER_NAME=name)

    def stop(self) -> None:
        """Workers by SIGTERM, then everything else."""
        for name, process in self._processes.items():
            if name.startswith("worker"):
                process.terminate()
        for process in self._processes.values():
            with suppress(subprocess.TimeoutExpired):
                if process in self._workers():
                    process.wait(60)
            end_group(process)
        self.redis_proxy.close()
        self.postgres_proxy.close()
        self.redis.kill()
        self.postgres.destroy()

    @property
    def url(self) -> str:
        """The first replica that accepts connections."""
        ports = wait_for(lambda: [p for p in self._ports.values() if listens(p)], "an API", 60)
        return f"http://127.0.0.1:{ports[0]}"

    def worker_pids(self) -> list[int]:
        """Main processes of the workers that run."""
        return [p.pid for p in self._workers() if p.poll() is None]

    def api_pids(self) -> list[int]:
        """API replicas that run."""
        found = [p for n, p in self._processes.items() if n.startswith("api")]
        return [p.pid for p in found if p.poll() is None]

    def _workers(self) -> list[subprocess.Popen[bytes]]:
        return [p for n, p in self._processes.items() if n.startswith("worker")]

    def _ended(self, name: str) -> bool:
        return name not in self._processes or self._processes[name].poll() is not None

    def _keep_api(self, name: str) -> None:
        if self._ended(name):
            self._ports.setdefault(name, free_port())
            app = "bitmill_service.main:create_app"
            options = ["--factory", "--port", str(self._ports[name]), "--log-level", "warning"]
            self._spawn(name, ["-m", "uvicorn", app, *options])

    def _spawn(self, name: str, args: list[str], **env: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, *args],
                env=_environment(self.settings) | env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


class EmbeddedStack:
    """`bitmill serve` on one data folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = _settings(folder)
        self.direct = self.settings
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the service and wait for its port."""
        self.settings.data.mkdir(parents=True, exist_ok=True)
        (self.settings.data / "lives").touch()
        self.keep()
        wait_for(lambda: listens(self._port), "the service", 60)

    def keep(self) -> None:
        """Start the service if it is not running."""
        if self._process is None or self._process.poll() is not None:
            self._process = self.launch()

    def launch(self) -> subprocess.Popen[bytes]:
        """One more `bitmill serve` on this data folder and port."""
        command = "from bitmill_service.cli.main import main; main()"
        with (self.folder / "serve.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", command, "serve", "--port", str(self._port)],
                env=_environment(self.settings),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def stop(self) -> None:
        """SIGTERM, as a container engine does."""
        if self._process is not None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(30)
            end_group(self._process)

    @property
    def url(self) -> str:
        """The service, once it listens."""
        wait_for(lambda: listens(self._port), "the service", 60)
        return f"http://127.0.0.1:{self._port}"

    def worker_pids(self) -> list[int]:
        """The worker that the service keeps."""
        if self._process is None:
            return []
        children = Path(f"/proc/{self._process.pid}/task").glob("*/children")
        found: list[int] = []
        for file in children:
            with suppress(OSError):
                found += [int(pid) for pid in file.read_text().split()]
        return found

    def api_pids(self) -> list[int]:
        """The service itself."""
        return [self._process.pid] if self._process and self._process.poll() is None else []


def children(pid: int) -> list[int]:
    """Direct children of a process, of all its threads."""
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += [int(child) for child in file.read_text().split()]
    return found


def request(stack: Stack, method: str, path: str, **options: object) -> httpx2.Response:
    """One HTTP request to a living API; connection errors are the caller's."""
    with httpx2.Client(base_url=stack.url, timeout=30) as client:
        return client.request(method, path, **options)


def runners(stack: Stack) -> list[int]:
    """Processes that were started for jobs of this stack."""
    return processes_of(str(stack.settings.data / "jobs"))


def spec_json(label: str, **fields: object) -> dict[str, object]:
    """A specification whose runner acts as `label` says."""
    model = {"source": "path", "path": "models/tiny"}
    allocation = {"method": "uniform"}
    spec = {"model": model, "budget": {"code_bits": 4}, "allocation": allocation}
    return json.loads(json.dumps(spec | {"label": label} | fields))
