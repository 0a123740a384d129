"""A Python that has imported the library already, for the children of jobs that tests run.

On a tiny model nine tenths of a job's time are imports: of the process that computes it and of the
one that reads what was packed (`pipeline/stages/verify.py`). So `warm_python` puts a script in the
place of `sys.executable`. The first of the `PROGRAMS` in an environment leaves a server behind that
imports the modules; it and later ones are forked from that server, with arguments, environment,
folder and files of their own and no other job's memory. They tell, die and are ended as programs
that were started. Everything else is Python itself.

So are programs that a test starts as a user does, and what they start: only with `FORKED` in their
environment do they hand the script on to their children.
"""

from __future__ import annotations

import fcntl
import gc
import hashlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

FORKED = {"BITMILL_TEST_FORKS": "1"}
"""Environment of a program whose children are to be forked."""
PYTHON = sys.executable
PARENT = "BITMILL_PARENT"
PROGRAMS = ("bitmill", "bitmill.models.skeleton", "bitmill_workers.execution.runner")
MODULES = (
    "bitmill.pipeline.stages.verify",
    "bitmill.pipeline.job",
    "bitmill.models.skeleton",
    "bitmill_workers.execution.runner",
    "transformers.models.llama.modeling_llama",
    "transformers.models.opt.modeling_opt",
)
READ_BY_IMPORTS = ("PYTHONPATH", "OMP_", "MKL_", "HF_", "TRANSFORMERS_", "TORCH_", "TRITON_", "LD_")
"""How the names of variables begin that must be equal in a server and in what it forks."""
NO_BARS = {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""Jobs set it for their children."""
SCRIPT = """#!/bin/bash
module=
[ "$1" = -m ] && module=$2
[ "$BITMILL_TEST_FORKS $1 $2" = "1 -P -m" ] && module=$3
[ -z "$LOCAL_RANK" ] && case "$module" in
    {programs}) exec {python} -I -S {here} call {folder} {pid} "$@" ;;
esac
[ "$BITMILL_TEST_FORKS" ] && exec -a {folder}/bin/python {python} "$@"
exec {python} "$@"
"""
_FILES = 16
_SERVERS = 4
"""At most; each takes a few hundred megabytes."""


@contextmanager
def warm_python(folder: Path, session: int) -> Iterator[None]:
    """`sys.executable` is the script meanwhile.

    folder: takes it and the servers' sockets, and is what Python takes for a virtual environment
    with this one's packages. session: the process with which servers end.
    """
    real, script = sys.executable, folder / "bin" / "python"
    if not script.exists():
        own = folder / f"new-{os.getpid()}"
        (own / "bin").mkdir(parents=True)
        (own / "lib").symlink_to(Path(sys.prefix) / "lib")
        (own / "pyvenv.cfg").write_text(f"home = {Path(sys.base_prefix) / 'bin'}\n")
        text = SCRIPT.format(
            programs="|".join(PROGRAMS),
            python=PYTHON,
            here=Path(__file__).resolve(),
            folder=folder,
            pid=session,
        )
        (own / "bin" / "python").write_text(text)
        (own / "bin" / "python").chmod(0o755)
        for part in ("lib", "pyvenv.cfg", "bin"):
            with suppress(OSError):  # another process of tests was quicker
                (own / part).rename(folder / part)
    sys.executable = str(script)
    try:
        yield
    finally:
        sys.executable = real


def _place(folder: Path, environment: Mapping[str, str]) -> str:
    """The socket of the server for this environment."""
    read = {n: v for n, v in environment.items() if n.startswith(READ_BY_IMPORTS)} | NO_BARS
    return str(
        folder
        / f"server-{hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()[:16]}"
    )


def call(folder: Path, session: str, arguments: list[str]) -> None:
    """Let the server fork `python <arguments>`; see that there is one."""
    files = [int(fd) for fd in os.listdir("/proc/self/fd")]
    files = [fd for fd in files if _inheritable(fd)]
    place = _place(folder, os.environ)
    with socket.socket(socket.AF_UNIX) as server:
        if not _connected(server, place):
            _start_server(place, session)
            if not _connected(server, place):
                os.execv(sys.executable, [sys.executable, *arguments])
        asked = {
            "arguments": arguments,
            "environment": dict(os.environ),
            "folder": os.getcwd(),
            "files": files,
        }
        data = json.dumps(asked).encode() + b"\n"
        sent = socket.send_fds(server, [data], files)
        server.sendall(data[sent:])
        with server.makefile() as answers:
            answer = answers.readline()
    status = int(answer or 1)
    if status < 0:
        with suppress(OSError):  # SIGKILL
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


def _inheritable(fd: int) -> bool:
    with suppress(OSError):
        return os.get_inheritable(fd)
    return False


def _connected(server: socket.socket, place: str) -> bool:
    with suppress(OSError):
        server.connect(place)
        return True
    return False


def _start_server(place: str, session: str) -> None:
    """Start the server, unless another caller did or there are enough.

    Whoever connects before it has imported everything waits for it.
    """
    if len(list(Path(place).parent.glob("server-*"))) >= _SERVERS:
        return
    with socket.socket(socket.AF_UNIX) as listening:
        own = str(Path(place).with_name(f"new-{os.getpid()}"))
        listening.bind(own)
        listening.listen(64)
        try:
            os.link(own, place)
        except FileExistsError:
            return
        finally:
            os.unlink(own)
        subprocess.Popen(
            [sys.executable, "-P", __file__, "serve", place, session, str(listening.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=[listening.fileno()],
            env=os.environ | NO_BARS,
            cwd="/",
        )


def serve(place: str, session: str, listening_fd: str) -> None:
    """Import the modules, then fork a process per connection until the test session has ended."""
    with socket.socket(fileno=int(listening_fd)) as listening:
        for module in MODULES:
            __import__(module)
        gc.collect()
        gc.freeze()  # what forks collect is theirs alone
        sys.executable = str(Path(place).with_name("bin") / "python")
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
    ready, _, _ = select.select([connection, session_end, end], [], [])
    if end not in ready:
        for kill in (os.killpg, os.kill):  # it may have no group of its own yet
            with suppress(ProcessLookupError):
                kill(program, signal.SIGKILL)
    _, status = os.waitpid(program, 0)
    with suppress(OSError):
        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def _become(asked: dict[str, Any], fds: list[int]) -> None:
    """Be `python -m <program> ...` with these files under the numbers that they had."""
    os.setsid()
    above = [fcntl.fcntl(fd, fcntl.F_DUPFD, max(asked["files"]) + 1) for fd in fds]
    for fd in fds:
        os.close(fd)
    for number, fd in zip(asked["files"], above, strict=True):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.environ[PARENT] = str(os.getppid())
    tempfile.tempdir = None
    for text in (sys.stdout, sys.stderr):
        text.reconfigure(write_through=bool(os.environ.get("PYTHONUNBUFFERED")))
    module, *sys.argv[1:] = asked["arguments"][asked["arguments"].index("-m") + 1 :]
    status = 1
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
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
        call(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
    else:
        serve(*sys.argv[2:])
