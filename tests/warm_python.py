"""A Python that has imported the library already, for the children of jobs that tests run.

Every job ends with a process of its own that reads what was packed (`pipeline/stages/verify.py`).
On a tiny model nine tenths of a job's time are that process's imports. So `warm_python` puts a
script in the place of `sys.executable`. The first `python -m bitmill ...` of a session runs as ever
and leaves a server behind that imports the modules; later ones are forked from it, with arguments,
environment, folder and files of their own and no other job's memory. They tell, die and are ended
as programs that were started. Everything else, and a call in another environment, is Python itself.
So are all calls of tests that start `bitmill` as a user does, from processes of their own.
"""

from __future__ import annotations

import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PARENT = "BITMILL_PARENT"
MODULES = (
    "bitmill.pipeline.stages.verify",
    "bitmill.pipeline.job",
    "transformers.models.llama.modeling_llama",
    "transformers.models.opt.modeling_opt",
)
SCRIPT = """#!/bin/sh
if [ "$1 $2" = "-m bitmill" ]; then
    exec {python} -I -S {here} call {socket} {pid} "$@"
fi
exec {python} "$@"
"""


@contextmanager
def warm_python(folder: Path) -> Iterator[None]:
    """`sys.executable` is the script meanwhile; `folder` takes it and the server's socket."""
    real, script = sys.executable, folder / "python"
    here, place = Path(__file__).resolve(), folder / "socket"
    script.write_text(SCRIPT.format(python=real, here=here, socket=place, pid=os.getpid()))
    script.chmod(0o755)
    sys.executable = str(script)
    try:
        yield
    finally:
        sys.executable = real


def _comparable(environment: Mapping[str, str]) -> dict[str, str]:
    """What must be equal: all but variables that are read when they are needed."""
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith(("BITMILL_", "PYTEST_CURRENT_TEST"))
    }


def call(place: str, session: str, arguments: list[str]) -> None:
    """Run `python <arguments>`: let the server fork it, or be it and see that there is a server."""
    python = [sys.executable, *arguments]
    first = Path(place).with_name("environment")
    if not first.exists():
        own = first.with_name(f"environment-{os.getpid()}")
        own.write_text(json.dumps(_comparable(os.environ)))
        own.rename(first)
    if _comparable(os.environ) != json.loads(first.read_text()):
        os.execv(sys.executable, python)
    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.connect(place)
        except OSError:
            _start_server(place, session)
            os.execv(sys.executable, python)
        asked = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
        socket.send_fds(server, [json.dumps(asked).encode() + b"\n"], [0, 1, 2])
        with server.makefile() as answers:
            answer = answers.readline()
    status = int(answer or 1)
    if status < 0:
        with suppress(OSError):  # SIGKILL
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


def _start_server(place: str, session: str) -> None:
    subprocess.Popen(
        [sys.executable, "-P", __file__, "serve", place, session],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    )


def serve(place: str, session: str) -> None:
    """Import the modules, then fork a process per connection until the test session has ended."""
    with suppress(OSError), socket.socket(socket.AF_UNIX) as listening:
        listening.bind(place + ".new")  # a second server ends here
        for module in MODULES:
            __import__(module)
        listening.listen()
        os.rename(place + ".new", place)
        sys.executable = str(Path(place).with_name("python"))
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
        session_end = os.pidfd_open(int(session))
        while True:
            ready, _, _ = select.select([listening, session_end], [], [])
            if session_end in ready:
                return
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                _oversee(connection, session_end)
            connection.close()


def _oversee(connection: socket.socket, session_end: int) -> None:
    """Fork the program, end it when its caller is gone, and tell the caller how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    data, fds, _, _ = socket.recv_fds(connection, 1 << 16, 3)
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
    ready, _, _ = select.select([connection, session_end, end], [], [])
    if end not in ready:
        os.kill(program, signal.SIGKILL)
    _, status = os.waitpid(program, 0)
    with suppress(OSError):
        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def _become(asked: dict[str, Any], fds: list[int]) -> None:
    """Be `python -m bitmill ...` with these files as standard input, output and error."""
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.environ[PARENT] = str(os.getppid())
    sys.argv = asked["arguments"][1:]
    status = 1
    try:
        runpy.run_module("bitmill", run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001  (the end of the process)
        traceback.print_exc()
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    if sys.argv[1] == "call":
        call(sys.argv[2], sys.argv[3], sys.argv[4:])
    else:
        serve(*sys.argv[2:])
