"""A process that has imported the library, from which others are forked. Torch-free.

Importing torch and transformers takes seconds, and a job does it twice: in its own process and in
the one that checks what was packed. While `warm_library` lasts, `python -m bitmill ...` is forked
from a server (`forks.py`) where `run_child` starts it, here or in a process that was started
meanwhile.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path

from bitmill.runtime import forks
from bitmill.runtime.forks import PARENT
from bitmill.runtime.lifetime import die_with_parent

WARM = "BITMILL_WARM"
"""Environment variable: the server's socket."""

_MODULES = ("bitmill.cli", "bitmill.pipeline.job", "bitmill.pipeline.stages.verify")
_PROGRAM = ("-m", "bitmill")
_GRACE_S = 10.0


@contextmanager
def warm_library() -> Iterator[None]:
    """Processes of the library are forked meanwhile; one server, which is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="bitmill-") as folder:
        place = str(Path(folder, "socket"))
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(place)
            listening.listen()
            server = _start(listening)
        before = os.environ.get(WARM)
        os.environ[WARM] = place
        try:
            yield
        finally:
            os.environ.pop(WARM)
            if before is not None:
                os.environ[WARM] = before
            server.terminate()
            try:
                server.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def command(arguments: Sequence[str]) -> list[str]:
    """What `python <arguments>` is started by: Python, or a caller of the server."""
    place = os.environ.get(WARM)
    if place is None or tuple(arguments[:2]) != _PROGRAM:
        return [sys.executable, *arguments]
    return [sys.executable, "-I", "-S", forks.__file__, place, *arguments]


def _start(listening: socket.socket) -> subprocess.Popen[bytes]:
    """SIGINT is blocked in it and what it forks, as in other children (`child.py`)."""
    fd = listening.fileno()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "bitmill.runtime.warm", str(fd)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[fd],
            env=os.environ | {PARENT: str(os.getpid())},
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _serve(listening: socket.socket) -> None:
    """Fork an overseer for every caller, until SIGTERM."""
    die_with_parent(parent=int(os.environ[PARENT]))
    for module in _MODULES:
        import_module(module)
    warnings.simplefilter("ignore", DeprecationWarning)  # of threads that idle beside a fork
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        while True:
            connection, _ = listening.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                listening.close()
                forks.oversee(connection)
            connection.close()
            _reap(os.WNOHANG)
    finally:
        _reap(0)


def _reap(options: int) -> None:
    """Wait for overseers, so that their time counts as this process's children's."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, options)[0]:
            pass


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
