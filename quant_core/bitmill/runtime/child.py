"""Processes that a job starts, and how each of them ended.

A child hands what it raises to its parent as `BitmillError.to_dict` through its standard output,
which is no file and so is there on a full disk too; what it prints goes to standard error. A child
that died without a word is told by its return code:

    ended by a signal that a fault of its own raises (SIGSEGV, SIGABRT, ...)   ProcessFailed
    ended by any other signal, such as the SIGKILL of a kernel without memory  ResourceError, killed
    ended by itself                                                            ProcessFailed

Torch-free.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from bitmill.errors import BitmillError, ProcessFailed, ResourceError, as_bitmill_error
from bitmill.runtime.lifetime import die_with_parent

_OWN_FAULTS = frozenset(
    {
        *(signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL),
        *(signal.SIGSYS, signal.SIGTRAP),
    }
)


def death(what: str, status: int, *, code: str | None = None) -> BitmillError:
    """The error that stands for a process that ended without telling why.

    what: the process in words. status: as `subprocess` returns it, -N for signal N. code: of a
    fault of the program, where it has one of its own.
    """
    if status >= 0:
        return ProcessFailed(f"{what} ended with exit code {status}", code=code)
    how = f"{what} was ended by signal {-status} ({_name(-status)})"
    if -status in _OWN_FAULTS:
        return ProcessFailed(how, code=code)
    if -status == signal.SIGKILL:
        how += ", most often because the machine's memory ran out"
    return ResourceError(
        how,
        code="killed",
        hint="Free memory on the machine or use a larger one, then run the job again.",
    )


def _name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else "unknown"


def run_child(what: str, arguments: Sequence[str]) -> None:
    """Run `python <arguments>`, a program that is `as_child`, and wait for its end.

    what: the process in words. Raises what the child raised, else how it died (`death`).
    """
    done = subprocess.run(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        check=False,
        env=os.environ | {"PYTHONSAFEPATH": "1"},
    )
    if done.returncode != 0:
        raise told(done.stdout) or death(what, done.returncode)


def told(output: bytes | str) -> BitmillError | None:
    """The error in the last line of what a process wrote, None where there is none."""
    lines = output.strip().splitlines()
    with suppress(ValueError):
        found = json.loads(lines[-1]) if lines else None
        if isinstance(found, dict) and isinstance(found.get("error"), dict):
            return BitmillError.from_dict(found["error"])
    return None


@contextmanager
def as_child() -> Iterator[None]:
    """Be a process that `run_child` started: end with the parent, and tell it what is raised."""
    die_with_parent()
    parent = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    except Exception as error:  # noqa: BLE001  (the boundary of the process)
        known = as_bitmill_error(error)
        os.write(parent, json.dumps({"error": known.to_dict()}).encode())
        if known is not error:
            with suppress(OSError):  # the log may lie on the disk that is full
                traceback.print_exc()
        sys.exit(1)
