"""Start the production stack natively on free loopback ports and keep it until it is stopped.

    scripts/stack --models models=/srv/models [--data DIR] [--workers 2] [--runner MODULE]

Prints one JSON line with the addresses once everything answers. Servers are the Debian packages
redis-server, postgresql and nginx-light; the S3 server is moto's, which keeps objects in memory and
is for trying things out only. Passwords are made anew at every start. SIGTERM or Ctrl-C ends all.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    """A port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_port(port: int, what: str, timeout: float = 60) -> None:
    """Return once the port accepts connections."""
    deadline = time.monotonic() + timeout
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if time.monotonic() > deadline:
            raise SystemExit(f"{what} did not start; see the logs in the data folder")
        time.sleep(0.05)


class NativeStack:
    """All processes of one stack; `up` starts them, `down` ends them."""

    def __init__(self, data: Path, models: dict[str, Path], workers: int, runner: str | None):
        self.data, self.models, self.workers, self.runner = data, models, workers, runner
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.ports = {
            name: free_port()
            for name in ("redis", "postgres", "s3", "api-0", "api-1", "http", "storage")
        }
        self.secrets = {name: secrets.token_hex(16) for name in ("redis", "postgres", "s3", "hook")}
        self.as_postgres = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []

    def up(self) -> dict[str, object]:
        """Start everything in order and answer the addresses."""
        self.data.mkdir(parents=True, exist_ok=True)
        self._redis()
        self._postgres()
        s3 = ["-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.ports["s3"])]
        self._python("s3", s3, {})
        wait_port(self.ports["s3"], "the S3 server")
        settings = self._settings()
        prepare = [sys.executable, "-m", "bitmill_workers.prepare"]
        with (self.data / "prepare.log").open("wb") as log:
            subprocess.run(prepare, env=os.environ | settings, check=True, stderr=log)
        for name in ("api-0", "api-1"):
            app = ["-m", "uvicorn", "--factory", "bitmill_service.main:create_app"]
            app += ["--http", "bitmill_service.http.connections:GuardedProtocol"]
            log = str(ROOT / "deploy" / "logging.json")
            options = ["--port", str(self.ports[name]), "--log-config", log]
            folder = {
                "BITMILL_DATA": str(self.data / "apis")
            }  # of all: parts of uploads come to any
            self._python(name, [*app, *options], settings | folder)
        for number in range(self.workers):
            name = f"worker-{number}"
            own = {"BITMILL_WORKER_NAME": name, "BITMILL_DATA": str(self.data / name)}
            self._python(name, ["-m", "bitmill_workers.worker"], settings | own)
        for name in ("api-0", "api-1"):
            wait_port(self.ports[name], name)
        self._nginx()
        return {
            "url": f"http://127.0.0.1:{self.ports['http']}",
            "apis": [f"http://127.0.0.1:{self.ports[name]}" for name in ("api-0", "api-1")],
            "data": str(self.data),
            "pids": {name: process.pid for name, process in self.processes.items()},
        }

    def down(self) -> None:
        """Workers first, so that they hand their jobs back; then the rest."""
        for prefix in ("nginx", "worker", "api", "s3", "redis"):
            group = [p for name, p in self.processes.items() if name.startswith(prefix)]
            for process in group:
                process.terminate()
            for process in group:
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        self._pg_ctl("-m", "fast", "stop")
        shutil.rmtree(self.postgres)

    def _settings(self) -> dict[str, str]:
        ports, words = self.ports, self.secrets
        database = f"bitmill:{words['postgres']}@127.0.0.1:{ports['postgres']}/postgres"
        found = {
            "BITMILL_DATA": str(self.data / "prepare"),
            "BITMILL_DATABASE_URL": f"postgresql+psycopg://{database}",
            "BITMILL_BROKER_URL": f"redis://:{words['redis']}@127.0.0.1:{ports['redis']}/0",
            "BITMILL_S3_BUCKET": "bitmill",
            "BITMILL_S3_ENDPOINT": f"http://127.0.0.1:{ports['s3']}",
            "BITMILL_S3_PUBLIC_ENDPOINT": f"http://127.0.0.1:{ports['storage']}",
            "BITMILL_S3_ACCESS_KEY": "stack",
            "BITMILL_S3_SECRET_KEY": words["s3"],
            "BITMILL_WEBHOOK_SECRET": words["hook"],
            "BITMILL_MODEL_ROOTS": json.dumps({k: str(v) for k, v in self.models.items()}),
            "BITMILL_QUEUES": "cpu",
            "BITMILL_RUNNER_NETWORK": "isolate",
        }
        return found | ({"BITMILL_RUNNER_MODULE": self.runner} if self.runner else {})

    def _redis(self) -> None:
        folder = self.data / "redis"
        folder.mkdir()
        config = folder / "redis.conf"
        config.touch(mode=0o600)
        config.write_text(
            f"bind 127.0.0.1\nport {self.ports['redis']}\ndir {folder}\nappendonly yes\n"
            f"maxmemory-policy noeviction\nrequirepass {self.secrets['redis']}\n"
        )
        self._start("redis", ["redis-server", str(config)], {})
        wait_port(self.ports["redis"], "Redis")

    def _postgres(self) -> None:
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
        if not found:
            raise SystemExit("PostgreSQL is not installed (Debian package postgresql)")
        self.programs = found[-1]
        # Root cannot run it, and its user may not be able to enter the data folder.
        self.postgres = Path(tempfile.mkdtemp(prefix="bitmill-postgres-"))
        password = self.postgres / "password"
        password.write_text(self.secrets["postgres"])
        if self.as_postgres:
            shutil.chown(self.postgres, "postgres")
            shutil.chown(password, "postgres")
        place = str(self.postgres / "data")
        options = ["-D", place, "-U", "bitmill", "-A", "scram-sha-256", f"--pwfile={password}"]
        self._run([str(self.programs / "initdb"), *options])
        password.unlink()
        listen = f"-p {self.ports['postgres']} -k '' -c listen_addresses=127.0.0.1"
        self._pg_ctl("-o", listen, "-l", str(self.postgres / "log"), "start")

    def _pg_ctl(self, *args: str) -> None:
        place = str(self.postgres / "data")
        self._run([str(self.programs / "pg_ctl"), "-D", place, "-w", *args])

    def _run(self, command: list[str]) -> None:
        quiet = subprocess.DEVNULL
        subprocess.run([*self.as_postgres, *command], check=True, cwd="/", stdout=quiet, timeout=60)

    def _nginx(self) -> None:
        """The deployed configuration with this stack's ports."""
        program = shutil.which("nginx") or "/usr/sbin/nginx"
        if not Path(program).exists():
            raise SystemExit("nginx is not installed (Debian package nginx-light)")
        folder = self.data / "nginx"
        folder.mkdir()
        text = (ROOT / "deploy" / "nginx.conf").read_text()
        upstreams = " ".join(f"server 127.0.0.1:{self.ports[name]};" for name in ("api-0", "api-1"))
        for old, new in (
            ("server api:8737 resolve max_fails=2 fail_timeout=5s;", upstreams),
            ("server storage:9000 resolve;", f"server 127.0.0.1:{self.ports['s3']};"),
            ("listen 8080;", f"listen 127.0.0.1:{self.ports['http']};"),
            ("listen 9000;", f"listen 127.0.0.1:{self.ports['storage']};"),
            ("/tmp/", f"{folder}/"),
        ):
            assert old in text, old
            text = text.replace(old, new)
        config = folder / "nginx.conf"
        config.write_text(text)
        self._start("nginx", [program, "-c", str(config), "-g", "daemon off;"], {})
        wait_port(self.ports["http"], "nginx")

    def _python(self, name: str, args: list[str], env: dict[str, str]) -> None:
        self._start(name, [sys.executable, *args], env)

    def _start(self, name: str, command: list[str], env: dict[str, str]) -> None:
        with (self.data / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command,
                env=os.environ | env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


def main() -> int:
    """Run a stack until told to stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runner", help=argparse.SUPPRESS)
    options = parser.parse_args()
    models = {name: Path(place) for name, _, place in (m.partition("=") for m in options.models)}
    data = (options.data or Path(tempfile.mkdtemp(prefix="bitmill-stack-"))).resolve()
    stack = NativeStack(data, models, options.workers, options.runner)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        print(json.dumps(stack.up()), flush=True)
        while all(process.poll() is None for process in stack.processes.values()):
            time.sleep(1)
        ended = [name for name, process in stack.processes.items() if process.poll() is not None]
        print(f"{', '.join(ended)} ended; see {data}", file=sys.stderr)
        return 1
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        stack.down()


if __name__ == "__main__":
    sys.exit(main())
