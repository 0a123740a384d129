"""`bitmill serve`: API, worker process and reconciler on one data folder, in one process tree.

Binds to loopback unless told otherwise; any other address needs a key, or the word that none is
wanted. Start: lock the data folder, bind the port, bring the schema up to date, start the worker,
serve. Stop: end event streams, let downloads finish for a few seconds, stop the worker (which hands
its job back), unlock. Nothing is left running.
"""

from __future__ import annotations

import errno
import ipaddress
import signal
import socket
import threading
from types import FrameType
from typing import Self

import uvicorn

from bitmill.errors import InputError
from bitmill_service.embedded.data_lock import FileLock
from bitmill_service.embedded.worker_process import WorkerProcess
from bitmill_service.http.access import is_loopback
from bitmill_service.http.connections import BACKLOG, GuardedProtocol, raise_file_limit
from bitmill_service.http.same_origin import LOOPBACK_NAMES
from bitmill_service.main import create_app
from bitmill_service.settings import ServiceSettings
from bitmill_workers.store.db import Database
from bitmill_workers.store.keys import KeyStore
from bitmill_workers.store.migrate import upgrade

_DRAIN_S = 10
_START_S = 60.0


class ServeError(InputError):
    """The service cannot start."""

    code = "cannot_serve"


class EmbeddedService:
    """The whole service in this process and its children.

    Use `run` in the main thread of a program, or as a context manager beside other work.
    """

    def __init__(self, settings: ServiceSettings, *, worker: bool = True) -> None:
        if is_loopback(settings.host) and not settings.allowed_hosts:
            settings = settings.model_copy(update={"allowed_hosts": LOOPBACK_NAMES})
        self.settings = settings
        self._lock = FileLock(settings.data / "lock", what="the data folder")
        self.worker = WorkerProcess(settings) if worker else None
        self._listener: socket.socket | None = None
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """The address that clients use; known once started."""
        assert self._listener is not None, "the service has not been started"
        host, port = self._listener.getsockname()[:2]
        if ipaddress.ip_address(host).is_unspecified:
            host = "127.0.0.1" if "." in host else "::1"
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def prepare(self) -> None:
        """Everything that can fail, before anything serves.

        Raises `AlreadyInUse`, or `ServeError` for an address that cannot be bound, or that others
        reach while there is no key.
        """
        raise_file_limit()
        self.settings.data.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock.acquire()
        try:
            self._listener = bind(self.settings.host, self.settings.port)
            self._lock.describe(url=self.url)
            database = Database(self.settings.database)
            try:
                upgrade(database)
                self._refuse_strangers(KeyStore(database))
            finally:
                database.close()
        except BaseException:
            self._release()
            raise

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT; `prepare` first. Main thread only."""
        server = self._make_server()
        # uvicorn raises the signal again when it has stopped; the worker must be stopped after.
        before = {s: signal.signal(s, _ignore) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._start_worker()
            server.run(sockets=[self._require_listener()])
        finally:
            self._stop_all()
            for number, handler in before.items():
                signal.signal(number, handler)

    def __enter__(self) -> Self:
        self.prepare()
        server = self._make_server()
        self._thread = threading.Thread(
            target=server.run, kwargs={"sockets": [self._require_listener()]}, name="api"
        )
        self._thread.start()
        try:
            self._await_start(server)
            self._start_worker()
        except BaseException:
            self._stop_all()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_all()

    def _refuse_strangers(self, keys: KeyStore) -> None:
        host = self.settings.host
        if self.settings.keys == "off" or is_loopback(host) or keys.any(live=True):
            return
        raise ServeError(
            f"on {host} others can reach this service, and there is no API key: make one with "
            "`bitmill keys create NAME`, or let everybody in with --insecure",
            code="no_key",
            param="host",
        )

    def _make_server(self) -> uvicorn.Server:
        app = create_app(self.settings)
        config = uvicorn.Config(
            app,
            http=GuardedProtocol,
            backlog=BACKLOG,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=_DRAIN_S,
            server_header=False,
        )
        self._server = uvicorn.Server(config)
        return self._server

    def _await_start(self, server: uvicorn.Server) -> None:
        assert self._thread is not None
        for _ in range(int(_START_S / 0.02)):
            if server.started:
                return
            self._thread.join(0.02)
            if not self._thread.is_alive():
                break
        raise ServeError("the API did not start; the log above says why")

    def _require_listener(self) -> socket.socket:
        assert self._listener is not None, "call prepare() first"
        return self._listener

    def _start_worker(self) -> None:
        if self.worker is not None:
            self.worker.start()

    def _stop_all(self) -> None:
        if self._server is not None:
            self._server.should_exit = True
        if self._thread is not None:
            self._thread.join(_DRAIN_S + 20)
        if self.worker is not None:
            self.worker.stop()
        self._release()

    def _release(self) -> None:
        if self._listener is not None:
            self._listener.close()
        self._lock.release()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 lets the system choose. Raises `ServeError`."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise _bind_error(host, port, error) from error


def _bind_error(host: str, port: int, error: OSError) -> ServeError:
    if error.errno == errno.EADDRINUSE:
        return ServeError(
            f"port {port} on {host} is in use: choose another with --port (0 picks a free one), "
            "or stop the program that uses it",
            code="port_in_use",
            param="port",
        )
    if error.errno == errno.EACCES:
        return ServeError(
            f"port {port} needs more rights: choose one above 1023 with --port", param="port"
        )
    return ServeError(f"cannot listen on {host}:{port}: {error.strerror or error}", param="host")


def _ignore(number: int, frame: FrameType | None) -> None:
    """The signal has done its work: the server has stopped."""
