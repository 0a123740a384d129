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

import ctypes
import gc
import hashlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.flags.no_site:  # a caller, which has no packages: `call ROOT ...`
    sys.path.insert(0, sys.argv[2])

from bitmill.runtime import forks

FORKED = {"BITMILL_TEST_FORKS": "1"}
"""Environment of a program whose children are to be forked."""
PYTHON = sys.executable
PROGRAMS = (
    "bitmill",
    "bitmill.models.skeleton",
    "bitmill.runtime.warm",
    "bitmill_workers.execution.runner",
    "bitmill_workers.execution.rank",
    "rank_function",
)
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
OF_RANKS = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
"""What torch's launcher sets of ranks is read when they meet."""
NO_BARS = {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""Jobs set it for their children."""
SCRIPT = """#!/bin/bash
module=
[ "$1" = -m ] && module=$2
[ "$BITMILL_TEST_FORKS$LOCAL_RANK" ] && [ "$1 $2" = "-P -m" ] && module=$3
case "$module" in
    {programs}) exec {python} -I -S {here} call {root} {folder} {pid} "$@" ;;
esac
[ "$BITMILL_TEST_FORKS" ] && exec -a {folder}/bin/python {python} "$@"
exec {python} "$@"
"""
_SERVERS = 8
"""At most; each takes 100 to 300 megabytes."""


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
        settings = Path(sys.prefix) / "pyvenv.cfg"  # whether the base's packages are seen too
        home = f"home = {Path(sys.base_prefix) / 'bin'}\n"
        (own / "pyvenv.cfg").write_text(settings.read_text() if settings.exists() else home)
        text = SCRIPT.format(
            programs="|".join(PROGRAMS),
            python=PYTHON,
            here=Path(__file__).resolve(),
            root=Path(forks.__file__).resolve().parents[2],
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
    read = {
        name: value
        for name, value in environment.items()
        if name.startswith(READ_BY_IMPORTS) and name != OF_RANKS
    } | NO_BARS
    return str(
        folder
        / f"server-{hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()[:16]}"
    )


def call(folder: Path, session: str, arguments: list[str]) -> None:
    """Let the server fork `python <arguments>`; see that there is one."""
    place = _place(folder, os.environ)
    with socket.socket(socket.AF_UNIX) as server:
        if not _connected(server, place):
            _start_server(place, session)
            if not _connected(server, place):
                paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
                os.environ["PYTHONPATH"] = os.pathsep.join(paths)
                os.execv(sys.executable, [sys.executable, *arguments])
        forks.ask(server, arguments)


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
        sys.path.append(str(Path(__file__).parent))
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
                _join_network(connection)
                forks.oversee(connection, [session_end])
            connection.close()


def _join_network(connection: socket.socket) -> None:
    """Be in the caller's network: runners have one of their own, in which their ranks meet."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    caller, _, _ = struct.unpack("3i", credentials)
    for name in ("user", "net"):  # who is not root may join a network only as a user of its owner
        theirs = Path(f"/proc/{caller}/ns/{name}")
        with suppress(FileNotFoundError):  # the caller is gone
            if not theirs.samefile(f"/proc/self/ns/{name}"):
                fd = os.open(theirs, os.O_RDONLY)
                if ctypes.CDLL(None, use_errno=True).setns(fd, 0) != 0:
                    raise OSError(ctypes.get_errno(), "setns")
                os.close(fd)


if __name__ == "__main__":
    if sys.argv[1] == "call":
        call(Path(sys.argv[3]), sys.argv[4], sys.argv[5:])
    else:
        serve(*sys.argv[2:])
