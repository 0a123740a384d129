"""A process that has imported the library, from which others are forked. Torch-free.

Importing torch and transformers takes seconds, and a job does it twice: in its own process and in
the one that checks what was packed. While `warm_library` lasts, `python -m bitmill ...` is forked
from a server where `run_child` starts it, here or in a process that was started meanwhile:

    run_child -> caller: hands its files, folder, environment and arguments to the server
    server -> overseer -> program: `python -m bitmill`, killed when the caller is gone
    caller: ends as the program ended

The program begins with imported modules and with nothing that another job computed. Where the
server is gone, the caller becomes Python itself. This file is run as a script too, alone.
"""

from __future__ import annotations

import json
import os
import select
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
from typing import Any, NoReturn

WARM = "BITMILL_WARM"
"""Environment variable: the server's socket."""
PARENT = "BITMILL_PARENT"
"""Environment variable: process id of the parent that waits for a process (`child.py`)."""

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
    return [sys.executable, "-I", "-S", __file__, place, *arguments]


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


def _call(place: str, arguments: list[str]) -> NoReturn:
    """Have the server run `python <arguments>`, and end as that does."""
    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.connect(place)
        except OSError:
            os.execv(sys.executable, [sys.executable, *arguments])
        asked = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
        data = json.dumps(asked).encode() + b"\n"
        sent = socket.send_fds(server, [data], [0, 1, 2])
        server.sendall(data[sent:])
        with server.makefile() as answers:
            answer = answers.readline()
    status = int(answer or -signal.SIGKILL)
    if status < 0:
        with suppress(OSError):  # SIGKILL has no handler
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


def _serve(listening: socket.socket) -> None:
    """Fork an overseer for every caller, until SIGTERM."""
    from bitmill.runtime.lifetime import die_with_parent

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
                _oversee(connection)
            connection.close()
            _reap(os.WNOHANG)
    finally:
        _reap(0)


def _reap(options: int) -> None:
    """Wait for overseers, so that their time counts as this process's children's."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, options)[0]:
            pass


def _oversee(connection: socket.socket) -> NoReturn:
    """Fork the program, end it when its caller is gone, and tell the caller how it ended."""
    data, fds, _, _ = socket.recv_fds(connection, 1 << 16, 3)
    while not data.endswith(b"\n"):
        more = connection.recv(1 << 16)
        if not more:
            os._exit(0)
        data += more
    program = os.fork()
    if program == 0:
        connection.close()
        _become(json.loads(data), fds)
    for fd in fds:
        os.close(fd)
    end = os.pidfd_open(program)
    waited: tuple[socket.socket | int, ...] = (connection, end)
    ready, _, _ = select.select(waited, [], [])
    if end not in ready:
        os.kill(program, signal.SIGKILL)
    _, status = os.waitpid(program, 0)
    with suppress(OSError):
        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def _become(asked: dict[str, Any], fds: Sequence[int]) -> NoReturn:
    """Be `python -m bitmill ...` with these files as standard input, output and error."""
    import runpy
    import traceback

    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"] | {PARENT: str(os.getppid())})
    sys.argv = asked["arguments"][1:]
    status = 1
    try:
        runpy.run_module("bitmill", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001  (the end of the process)
        traceback.print_exc()
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        _serve(socket.socket(fileno=int(sys.argv[1])))
    else:
        _call(sys.argv[1], sys.argv[2:])
