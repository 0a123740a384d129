"""A supervised child: own session, liveness pipe, messages and log through pipes.

The child's standard input is its lifeline. A watchdog process in the child's group (see `lifeline`)
kills the whole group when the pipe closes, which the kernel does however the supervisor dies, or
when no beat has come for a lease, so that a supervisor that is merely stopped cannot leave a child
that works on a job which has been given to someone else.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from bitmill.runtime.lifetime import die_with_parent

_CHUNK = 1 << 16
_PASS = 1 << 20
_LAST_WORDS = 1 << 16
_DUMP_S = 1.0


def start_lifeline(lease_s: float) -> None:
    """Fork the watchdog of this process group; call it first, before any thread is started.

    It ends with this process, and kills the group when standard input closes or stays silent for
    `lease_s`. A process of its own, because a thread can be starved by native code.
    """
    if os.fork():
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        return
    die_with_parent()
    os.closerange(1, 256)
    while True:
        ready, _, _ = select.select([0], [], [], lease_s)
        if not ready or not os.read(0, _CHUNK):
            os.killpg(0, signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a child ended: its return code, or why it was stopped before; the end of its log."""

    status: int
    stopped: str | None = None
    said: str = ""


class _Pipe:
    """The reading end of a pipe; `open` turns False when the other end is closed."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.open = True
        os.set_blocking(fd, False)

    def read(self) -> bytes:
        """What is there now, at most `_PASS` bytes."""
        found = bytearray()
        while self.open and len(found) < _PASS:
            try:
                data = os.read(self.fd, _CHUNK)
            except BlockingIOError:
                break
            self.open = bool(data)
            found += data
        return bytes(found)


class Child:
    """A running child; `watch` until it ends or has to be stopped."""

    def __init__(self, module: str, args: Sequence[str], env: Mapping[str, str]) -> None:
        reader, writer = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *args, str(writer)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=dict(env),
                pass_fds=(writer,),
                start_new_session=True,
                bufsize=0,
            )
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        assert self._process.stdout is not None
        self._messages = _Pipe(reader)
        self._log = _Pipe(self._process.stdout.fileno())
        self._line = b""
        self.pid = self._process.pid

    def watch(
        self,
        *,
        on_message: Callable[[dict[str, Any]], None],
        on_log: Callable[[bytes], None],
        tick: Callable[[], str | None],
        tick_s: float,
        stall_s: float,
        wakeup_fd: int | None = None,
    ) -> Ended:
        """Relay messages and log until the child ends, then end what is left of its group.

        `tick` is called every `tick_s`, and at once when `wakeup_fd` becomes readable; an answer
        other than None stops the child's whole group for that reason. Without a message for
        `stall_s` the child's stacks are dumped to its log and it is stopped as "stalled".
        """
        exited, said = os.pidfd_open(self.pid), bytearray()

        def keep(data: bytes) -> None:
            said.extend(data)
            del said[:-_LAST_WORDS]
            on_log(data)

        try:
            stopped = self._until_end(exited, on_message, keep, tick, tick_s, stall_s, wakeup_fd)
            if stopped == "stalled":
                self._dump_stacks()
        finally:
            os.close(exited)
            self._end_group()
        status = self._process.wait()
        while self._relay(on_message):
            pass
        while data := self._log.read():
            keep(data)
        self._close()
        return Ended(status, stopped, said.decode(errors="replace"))

    def beat(self) -> None:
        """Tell the child's watchdog that the lease was renewed."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(b".")

    def _until_end(
        self,
        exited: int,
        on_message: Callable[[dict[str, Any]], None],
        on_log: Callable[[bytes], None],
        tick: Callable[[], str | None],
        tick_s: float,
        stall_s: float,
        wakeup_fd: int | None,
    ) -> str | None:
        heard = ticked = time.monotonic()
        while True:
            pipes = [pipe.fd for pipe in (self._messages, self._log) if pipe.open]
            wake = [] if wakeup_fd is None else [wakeup_fd]
            wait = max(0.0, ticked + tick_s - time.monotonic())
            ready, _, _ = select.select([exited, *pipes, *wake], [], [], wait)
            now = time.monotonic()
            heard = now if self._relay(on_message) else heard
            if data := self._log.read():
                on_log(data)
            if exited in ready:
                return None
            if now >= ticked + tick_s or wakeup_fd in ready:
                ticked = now
                if reason := tick() or ("stalled" if now - heard > stall_s else None):
                    return reason

    def _dump_stacks(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)
        time.sleep(_DUMP_S)

    def _end_group(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def _relay(self, on_message: Callable[[dict[str, Any]], None]) -> bool:
        """Hand over complete messages; True where anything was heard."""
        data = self._messages.read()
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            with suppress(ValueError):
                message = json.loads(line)
                if isinstance(message, dict):
                    on_message(message)
        return bool(data)

    def _close(self) -> None:
        os.close(self._messages.fd)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
