"""Processes that a job starts, what they tell, and how each of them ended.

A child tells its parent what it does as JSON lines on its standard output, which is no file and so
is there on a full disk too: messages of its own, last `{"result": ...}` or `{"error": ...}`, the
latter as `BitmillError.to_dict`; what it prints goes to standard error. A child that died without a
word is told by its return code:

    ended by SIGABRT, and its last words are that memory was refused to it     out_of_memory
    ended by a signal that a fault of its own raises (SIGSEGV, SIGABRT, ...)   ProcessFailed
    ended by any other signal, such as the SIGKILL of a kernel without memory  ResourceError, killed
    ended by itself                                                            ProcessFailed

No child outlives its parent: one that stops waiting, by Ctrl-C or an exception, ends the child, and
a child whose parent died without a word is killed by the kernel. Torch-free.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any

from bitmill.errors import (
    STOPS,
    BitmillError,
    ProcessFailed,
    ResourceError,
    as_bitmill_error,
    out_of_memory,
    speaks_of_memory,
)
from bitmill.runtime.forks import PARENT
from bitmill.runtime.lifetime import die_with_parent
from bitmill.runtime.warm import command

_LAST_WORDS = 1 << 16
_LAST_S = 2.0
"""How long a dead child's output is read on: what it has started may hold it open."""
_GRACE_S = 10.0
"""How long a child may take to end when it is told to."""
_OWN_FAULTS = frozenset(
    {
        *(signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL),
        *(signal.SIGSYS, signal.SIGTRAP),
    }
)


def death(what: str, status: int, *, code: str | None = None, said: str = "") -> BitmillError:
    """The error that stands for a process that ended without telling why.

    what: the process in words. status: as `subprocess` returns it, -N for signal N; launchers of
    others give 128 + N. code: of a fault of the program, where it has one of its own. said: the end
    of what it printed: C++ and Rust abort where memory is refused, and say so there alone.
    """
    number = -status if status < 0 else status - 128
    if not 0 < number <= signal.NSIG:
        return ProcessFailed(f"{what} ended with exit code {status}", code=code)
    how = f"{what} was ended by signal {number} ({_name(number)})"
    if number == signal.SIGABRT and (refused := speaks_of_memory(said)):
        return out_of_memory(f"{how}: {refused}")
    if number in _OWN_FAULTS:
        return ProcessFailed(how, code=code)
    if number == signal.SIGKILL:
        how += ", most often because the machine's memory ran out"
    return ResourceError(
        how,
        code="killed",
        hint="Free memory on the machine or use a larger one, then run the job again.",
    )


def _name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else "unknown"


def run_child(
    what: str,
    arguments: Sequence[str],
    on_message: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Run `python <arguments>`, a program that is `as_child`, and return its result.

    what: the process in words. on_message: gets what the child tells before. Raises what the child
    raised, else how it died (`death`).
    """
    last: dict[str, Any] = {}
    with _started(arguments) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        words = _LastWords(child.stderr)
        for line in child.stdout:
            last = _parsed(line)
            if last and not {"result", "error"} & last.keys():
                on_message(last)
        status = child.wait()
    said = words.heard()
    if "error" in last:
        raise BitmillError.from_dict(last["error"])
    if status != 0 or "result" not in last:
        raise death(what, status, said=said)
    result: dict[str, Any] = last["result"]
    return result


@contextmanager
def _started(arguments: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that is gone afterwards. SIGINT is blocked in it: a terminal sends it to the parent
    too, which ends the child.
    """
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        child = subprocess.Popen(
            command(arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONSAFEPATH": "1", PARENT: str(os.getpid())},
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    with child:  # closes its output and waits
        try:
            yield child
        finally:
            child.terminate()
            try:
                with suppress(subprocess.TimeoutExpired):
                    child.wait(_GRACE_S)
            finally:
                child.kill()


class _LastWords:
    """Hands on to standard error what a child prints there, and keeps the end of it."""

    def __init__(self, pipe: IO[str]) -> None:
        self._fd, self._kept = os.dup(pipe.fileno()), bytearray()
        self._thread = threading.Thread(target=self._hand_on, daemon=True, name="last words")
        self._thread.start()

    def heard(self) -> str:
        """The end of what was printed, once the child is gone."""
        self._thread.join(_LAST_S)
        return self._kept.decode(errors="replace")

    def _hand_on(self) -> None:
        with open(self._fd, "rb", buffering=0) as pipe:
            while data := pipe.read(_LAST_WORDS):
                self._kept.extend(data)
                del self._kept[:-_LAST_WORDS]
                with suppress(OSError):
                    os.write(2, data)


def _parsed(line: str) -> dict[str, Any]:
    with suppress(ValueError):
        found = json.loads(line)
        if isinstance(found, dict):
            return found
    return {}


class Tell:
    """Writes messages to the parent, one JSON object a line."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __call__(self, **message: Any) -> None:
        """Write one message whole, e.g. `tell(text="...")`."""
        data = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        while data:
            data = data[os.write(self._fd, data) :]

    @contextmanager
    def handed_on(self) -> Iterator[None]:
        """Processes that are started meanwhile write to the parent."""
        os.dup2(self._fd, 1)
        try:
            yield
        finally:
            os.dup2(2, 1)


@contextmanager
def as_child() -> Iterator[Tell]:
    """Be a process that `run_child` started: end with the parent, and tell it what is raised.

    In a process that was started otherwise the parent is the reader of standard output.
    """
    if PARENT in os.environ:
        die_with_parent(parent=int(os.environ[PARENT]))
    tell = Tell(os.dup(1))
    os.dup2(2, 1)
    try:
        yield tell
    except STOPS:
        raise
    except BaseException as error:  # noqa: BLE001  (the boundary of the process)
        known = as_bitmill_error(error)
        tell(error=known.to_dict())
        if known is not error:
            with suppress(OSError):  # the log may lie on the disk that is full
                traceback.print_exc()
        sys.exit(1)
