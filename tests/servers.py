"""Real Redis and PostgreSQL servers on free loopback ports, in temporary folders."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import sqlalchemy as sa

from stores import wait_for


def free_port() -> int:
    """A port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    """True where a server accepts connections on loopback."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Redis:
    """A Redis server that can be killed and started again; `aof` keeps its data."""

    program = shutil.which("redis-server")

    def __init__(self, folder: Path, *, aof: bool = True) -> None:
        self.folder = folder
        self.port = free_port()
        self.aof = aof
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Broker URL of database 0."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start and wait until it answers."""
        assert self.program is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / "redis.log"
        options = ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.folder)]
        options += ["--save", "", "--appendonly", "yes" if self.aof else "no"]
        self._process = subprocess.Popen(
            [self.program, *options, "--logfile", str(log)], start_new_session=True
        )
        wait_for(lambda: listens(self.port), "Redis")

    def kill(self) -> None:
        """End it as a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def command(self, *words: str) -> bytes:
        """Send one command (RESP array of bulk strings) and return the raw answer."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as link:
            parts = [f"${len(w.encode())}\r\n{w}\r\n" for w in words]
            link.sendall(f"*{len(parts)}\r\n{''.join(parts)}".encode())
            return link.recv(1 << 16)


def _postgres_programs() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


class Postgres:
    """A PostgreSQL server; every `database` starts out empty."""

    programs = _postgres_programs()

    def __init__(self) -> None:
        # Not below pytest's folder: root's is closed to the user that the server runs as.
        self.folder = Path(tempfile.mkdtemp(prefix="bitmill-postgres-"))
        if os.getuid() == 0:
            shutil.chown(self.folder, "postgres")
        self.port = free_port()

    def start(self) -> None:
        """Create the cluster on first use, start and wait until it answers."""
        data = self.folder / "data"
        if not data.exists():
            self._run("initdb", "-D", str(data), "-U", "bitmill", "-A", "trust", "-N")
        options = f"-p {self.port} -k '' -c listen_addresses=127.0.0.1 -c fsync=off"
        log = str(self.folder / "log")
        self._run("pg_ctl", "-D", str(data), "-l", log, "-o", options, "-w", "start")

    def stop(self, mode: str = "immediate") -> None:
        """End it; "immediate" is what a crash looks like."""
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-m", mode, "-w", "stop")

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside the block all of its processes are stopped, while its connections live on."""
        main = (self.folder / "data" / "postmaster.pid").read_text().split()[0]
        os.kill(int(main), signal.SIGSTOP)  # first, so that it starts no others
        told = subprocess.run(["pgrep", "-P", main], capture_output=True, text=True, check=True)
        numbers = [int(one) for one in (main, *told.stdout.split())]
        for number in numbers:
            os.kill(number, signal.SIGSTOP)
        try:
            yield
        finally:
            for number in reversed(numbers):
                os.kill(number, signal.SIGCONT)

    def destroy(self) -> None:
        """End it and delete its files."""
        self.stop()
        shutil.rmtree(self.folder)

    def database(self) -> str:
        """SQLAlchemy URL of an empty schema that belongs to a user of its own.

        Not a new database: that copies a few hundred files, and deleting them takes longer still.
        """
        name = f"test_{uuid.uuid4().hex}"
        engine = sa.create_engine(self.url("bitmill"), isolation_level="AUTOCOMMIT")
        with engine.connect() as conn:
            conn.exec_driver_sql(f"CREATE ROLE {name} LOGIN")
            conn.exec_driver_sql(f"ALTER ROLE {name} SET search_path = {name}")
            conn.exec_driver_sql(f"CREATE SCHEMA {name} AUTHORIZATION {name}")
        engine.dispose()
        return self.url(name)

    def restore(self, dump: Path) -> str:
        """SQLAlchemy URL of a new database filled from a dump of `pg_dump`; its user is bitmill."""
        assert self.programs is not None
        name = f"restored_{uuid.uuid4().hex}"
        place = ["-h", "127.0.0.1", "-p", str(self.port), "-U", "bitmill"]
        subprocess.run([str(self.programs / "createdb"), *place, name], check=True, timeout=60)
        options = ["-q", "-v", "ON_ERROR_STOP=1", "-f", str(dump), name]
        command = [str(self.programs / "psql"), *place, *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=60)
        return self.url("bitmill", name)

    def url(self, user: str, database: str = "postgres") -> str:
        """SQLAlchemy URL for one user."""
        return f"postgresql+psycopg://{user}@127.0.0.1:{self.port}/{database}"

    def cut_connections(self) -> None:
        """Terminate every session of every other client."""
        engine = sa.create_engine(self.url("bitmill"))
        with engine.connect() as conn:
            conn.exec_driver_sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE usename LIKE 'test_%%'"
            )
        engine.dispose()

    def _run(self, program: str, *args: str) -> None:
        assert self.programs is not None
        command = [str(self.programs / program), *args]
        if os.getuid() == 0:
            command = ["runuser", "-u", "postgres", "--", *command]
        subprocess.run(command, check=True, cwd="/", stdout=subprocess.DEVNULL, timeout=60)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that leads its own session, with all that it started there."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
