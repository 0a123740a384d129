"""Programs that a server forks for their callers instead of their being started. Torch-free.

A caller asks the server, which has imported what the program needs, over a local socket:

    caller: hands its open files, folder, environment and arguments over, and ends as the program
    server -> overseer -> program: `python -m MODULE ...`, killed when its caller is gone

The program begins with imported modules and with nothing that another one computed. This file is
run as a script too, as the caller, and then finds nothing but the standard library.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import runpy
import select
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

PARENT = "BITMILL_PARENT"
"""Environment variable: process id of the parent that waits for a process (`child.py`)."""

_FILES = 16


def ask(server: socket.socket, arguments: Sequence[str]) -> NoReturn:
    """Have the server at the other end run `python <arguments>`, and end as that does."""
    files = [fd for fd in map(int, os.listdir("/proc/self/fd")) if _inheritable(fd)]
    asked = {
        "arguments": arguments,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "files": files,
    }
    data = json.dumps(asked).encode() + b"\n"
    answer = ""
    with suppress(ConnectionError), server.makefile() as answers:  # the overseer may be killed
        sent = socket.send_fds(server, [data], files)
        server.sendall(data[sent:])
        answer = answers.readline()
    status = int(answer or -signal.SIGKILL)
    if status < 0:
        with suppress(OSError):  # SIGKILL has no handler
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


def oversee(connection: socket.socket, ends: Sequence[int] = ()) -> NoReturn:
    """Fork the program, end it when its caller is gone, and tell the caller how it ended.

    ends: files that are readable once all has to end.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    data, fds, _, _ = socket.recv_fds(connection, 1 << 16, _FILES)
    while not data.endswith(b"\n"):
        more = connection.recv(1 << 16)
        if not more:  # the caller is gone
            os._exit(0)
        data += more
    program = os.fork()
    if program == 0:
        connection.close()
        _become(json.loads(data), fds)
    for fd in fds:
        os.close(fd)
    end = os.pidfd_open(program)
    waited: list[socket.socket | int] = [connection, end, *ends]
    ready, _, _ = select.select(waited, [], [])
    if end not in ready:
        for kill in (os.killpg, os.kill):  # it may have no group of its own yet
            with suppress(ProcessLookupError):
                kill(program, signal.SIGKILL)
    _, status = os.waitpid(program, 0)
    with suppress(OSError):
        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def _inheritable(fd: int) -> bool:
    with suppress(OSError):  # the one that listed them is closed
        return os.get_inheritable(fd)
    return False


def _become(asked: dict[str, Any], fds: Sequence[int]) -> NoReturn:
    """Be `python -m MODULE ...` with these files under the numbers that they had."""
    os.setsid()
    above = [fcntl.fcntl(fd, fcntl.F_DUPFD, max(asked["files"]) + 1) for fd in fds]
    for fd in fds:
        os.close(fd)
    for number, fd in zip(asked["files"], above, strict=True):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"] | {PARENT: str(os.getppid())})
    tempfile.tempdir = None
    for text in (sys.stdout, sys.stderr):
        if isinstance(text, io.TextIOWrapper):
            text.reconfigure(write_through=bool(os.environ.get("PYTHONUNBUFFERED")))
    module, *sys.argv[1:] = asked["arguments"][asked["arguments"].index("-m") + 1 :]
    status = 1
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _main(place: str, arguments: list[str]) -> NoReturn:
    """Ask the server at `place`; where it is gone, be Python itself."""
    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.connect(place)
        except OSError:
            os.execv(sys.executable, [sys.executable, *arguments])
        ask(server, arguments)


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2:])
